"""The house keeps its promises: the root is the recipe, floors, imports, words, an honest README."""
import ast
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from conftest import ROOT, copied, run

STAGES = ["pretrain", "train_sft", "train_dpo", "train_mpo", "train_grpo", "train_ppo", "extract",
          "repair_eval"]
INSTRUMENTS = ["probe_linear", "probe_seg", "probe_align", "gradcam"]
SHARED = ["model", "data"]
FOLDERS = ["pivot", "judge", "tools", "toy", "study"]
FILES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))])
PACKAGES = {"torch", "transformers", "safetensors", "PIL", "numpy", "tqdm", "tokenizers"}
LAZY = {"study/report.py": {"matplotlib"},          # figures; imported where drawn, not without
        "study/signals_table.py": {"matplotlib"},
        "tools/figures.py": {"matplotlib"},
        "tools/parquet.py": {"pyarrow"}}


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def name_of(path):
    """model.py → "model", pivot/flags.py → "pivot.flags", pivot/__init__.py → "pivot"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {name_of(p): p for p in FILES}


def imports(path):
    """Names of our modules, and of packages, that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{a.name}" for a in node.names}
            found |= {w if w in OURS else node.module for w in whole}
    return found


GRAPH = {name: imports(path) & OURS.keys() for name, path in OURS.items()}


def needs(name, graph=GRAPH):
    """All modules of ours that come along with one."""
    found, todo = set(), [name]
    while todo:
        for other in graph[todo.pop()] - found:
            found.add(other)
            todo.append(other)
    return found


# ----------------------------------------------------------------------------------- what is where

def test_the_root_is_the_recipe():
    """`git ls-files` of the root, and the map of the README: the same names."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    names = {x.split("/")[0] for x in tracked.split("\n") if x} or {
        p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name != "runs"}
    python = {n for n in names if n.endswith(".py")}
    assert python == {f"{n}.py" for n in STAGES + INSTRUMENTS + SHARED}
    rest = {n for n in names - python if not n.startswith(".")}
    folders = {*FOLDERS, "benchmarks", "docs", "results", "tests", "weights"}
    assert rest == folders | {"README.md", "LICENSE", "Makefile", "requirements.txt",
                              "requirements-dev.txt", "requirements-bench.txt",
                              "requirements-compat.txt", "requirements-look.txt",
                              "requirements-prepare.txt"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = " ".join(re.findall(r"^\| (`.*?) \|", readme, re.M))
    assert python <= set(re.findall(r"`(\w+\.py)`", table))
    assert folders <= set(re.findall(r"`(\w+)/`", table))
    assert len(readme.split()) <= 1200


def test_every_folder_and_file_says_what_it_is():
    for folder in FOLDERS:
        assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    for path in FILES:
        text = lines(path)
        assert ast.get_docstring(ast.parse("\n".join(text))), path.name
        assert not [i for i, x in enumerate(text, 1) if len(x) > 100], path


# -------------------------------------------------------------------------------- who imports whom

def may(name):
    """Which of our modules a module may import (DESIGN: a stage imports model, data, pivot/, …)."""
    folder, _, file = name.rpartition(".")
    everything = set(OURS)
    pivot = {n for n in everything if n.split(".")[0] == "pivot"}
    judge = {n for n in everything if n.split(".")[0] == "judge"}
    toy = {n for n in everything if n.split(".")[0] == "toy"}
    study = {n for n in everything if n.split(".")[0] == "study"}
    if name == "model" or name in ("pivot.files", "pivot.printing", "judge.score"):
        return set()
    if name == "judge.intervals":
        return set()
    if name == "data":
        return {"model"} | pivot
    if folder == "pivot" or name == "pivot":
        return {"model"} | pivot
    if folder == "judge" or name == "judge":
        return {"model"} | pivot | judge
    if name == "repair_eval":
        return {"model", "data", "pretrain"} | pivot | judge
    if name == "gradcam":
        return {"model", "data", "train_sft", "train_dpo"} | pivot | judge
    if name in INSTRUMENTS:
        return {"model", "data"} | pivot | judge
    if name in ("train_grpo", "train_ppo"):            # they reward answers
        return {"model", "data", "judge.score"} | pivot
    if name in STAGES:
        return {"model", "data"} | pivot
    if folder == "toy" or name == "toy":               # of the recipe the layout alone: text, JSON
        return toy | {"pivot.files", "pivot.records"}
    if folder == "study" or name == "study":           # and what is a pure function
        return study | toy | {"pivot.files", "judge.score", "judge.intervals"}
    return everything - toy - study                                                    # tools/


def test_no_file_imports_from_a_higher_floor():
    for name, found in GRAPH.items():
        assert found <= may(name), f"{name} imports {sorted(found - may(name))}"


def test_no_circle():
    for name in OURS:
        assert name not in needs(name), f"{name} is part of a circle"


def test_run_time_imports_are_the_six():
    for path in FILES:
        allowed = PACKAGES | LAZY.get(str(path.relative_to(ROOT)), set())
        for name in imports(path) - OURS.keys():
            top = name.split(".")[0]
            assert top in allowed | set(sys.stdlib_module_names) | {*FOLDERS}, f"{path}: {name}"


def test_what_a_fork_takes_along():
    """Somebody's own loss needs model.py, data.py and pivot/; a probe brings no benchmark code, no
    checkpoint code, no other probe."""
    for stage in ("pretrain", "train_sft", "train_dpo", "train_mpo"):
        assert {n.split(".")[0] for n in needs(stage)} == {"model", "data", "pivot"}, stage
    for stage in ("train_grpo", "train_ppo"):
        assert {n for n in needs(stage) if n.startswith("judge")} == {"judge.score"}, stage
    seg = needs("probe_seg")
    assert not seg & {"judge.answer", "judge.score", "judge.report", "pivot.checkpoints",
                      *INSTRUMENTS}
    assert not any(n.startswith(("tools", "toy", "study")) for n in seg)


def test_one_module_knows_about_processes():
    for path in FILES:
        if path.name != "distributed.py":
            text = path.read_text(encoding="utf-8")
            assert "get_rank(" not in text and not re.search(r"\brank\s*[=!]=", text), path.name


def test_json_files_are_read_by_one_function():
    """files.json_of knows of byte order marks. (The study reads what it wrote itself.)"""
    for path in FILES:
        if path.parent.name != "study":
            for line in lines(path):
                assert not re.search(r"json\.loads?\(.*(read_text|read_bytes|open\()", line), path


def test_stage_names_are_not_wired_into_the_ground_floor():
    """A new stage needs no edit elsewhere: pivot/ knows no stage by its name."""
    for path in (ROOT / "pivot").glob("*.py"):
        code = ast.parse(path.read_text(encoding="utf-8"))
        words = {n.value for n in ast.walk(code) if isinstance(n, ast.Constant)
                 and isinstance(n.value, str)}
        assert not words & {"sft", "dpo", "mpo", "grpo", "ppo", "pretrain", "repair",
                            "train_sft.py", "train_dpo.py", "train_mpo.py", "train_grpo.py",
                            "train_ppo.py", "pretrain.py"}, path.name


def test_commands_import_pivot_first():
    """Its __init__ sees to it that Ctrl-C is no traceback while the slow imports follow."""
    for name in STAGES + INSTRUMENTS:
        first = next(n for n in ast.parse((ROOT / f"{name}.py").read_text()).body
                     if isinstance(n, ast.Import | ast.ImportFrom))
        assert ast.unparse(first) == "import pivot", name


# ------------------------------------------------------------------------------------------- words

def test_one_word_for_one_thing():
    """The encoder is no eye, the order of samples no plan; a line of text is not multiplied."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "study":             # "eye" names a part of its registered results
            assert not re.search(r"\beyes?\b", text), path
        assert "BatchPlan" not in text and "one_eyed" not in text, path
        assert not re.search(r"""["'] \* \(?(args\.|not |bool|[a-z_]+ [<>=!])""", text), \
            f"{path}: text times a flag"


def test_the_method_is_the_diff():
    """SFT, DPO and MPO run the same lines in the same order, but for the method and its reports.
    So do GRPO and PPO."""
    sft, dpo, mpo = ([x.strip() for x in lines(ROOT / f"train_{s}.py")]
                     for s in ("sft", "dpo", "mpo"))
    for one, other in ((sft, dpo), (dpo, mpo)):
        inside = one[one.index("def main():"):]
        missing = [x for x in inside if x and x not in other]
        assert len(missing) <= 10, missing
    grpo, ppo = ([x.strip() for x in lines(ROOT / f"train_{s}.py")] for s in ("grpo", "ppo"))
    missing = [x for x in grpo[grpo.index("def main():"):] if x and x not in ppo]
    assert len(missing) <= 26, missing


# --------------------------------------------------------------------------------- a stage of one's own

FORK = {                       # what somebody changes in a copy of train_sft.py: the loss, the name
    '"""Stage 2a, SFT: maximise the likelihood of the right answer alone. The control of the '
    'comparison.': '"""A loss of our own: answers the model is sure of count less (focal loss).',
    'parser.parse_args(argv), "sft", PAPER': 'parser.parse_args(argv), "focal", PAPER',
    "            # METHOD: L = −E log π(y_c), a mean over answer tokens":
        "            # METHOD: L = −E (1 − π(y_c))² log π(y_c)",
    "            loss = -logps.sum() / num_tokens":
        "            sure = logps.detach().exp() * (batch['labels'] != -100)\n"
        "            loss = -((1 - sure) ** 2 * logps).sum() / num_tokens"}


def test_a_new_stage_needs_no_edit_elsewhere(stage1, world, tmp_path):
    """It trains, resumes, is extracted, scored and shown, on one process and on two."""
    here, run_dir = tmp_path / "checkout", tmp_path / "runs" / "mine"
    here.mkdir()
    for name in STAGES + INSTRUMENTS + SHARED:
        shutil.copy(ROOT / f"{name}.py", here)
    for folder in ("pivot", "judge", "tools", "weights"):
        shutil.copytree(ROOT / folder, here / folder)
    text = (ROOT / "train_sft.py").read_text(encoding="utf-8")
    for old, new in FORK.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (here / "train_focal.py").write_text(text, encoding="utf-8")
    copied(stage1, run_dir)

    def command(*words, processes=1, code=0):
        done = run(*words, processes=processes, check=False, root=here)
        assert done.returncode == code, done.stdout[-1500:] + done.stderr[-1500:]
        return done.stdout + done.stderr

    tiny = ["--global-batch", 8, "--micro-batch", 8, "--workers", 0, "--data", world]
    said = command("train_focal.py", "--run-dir", run_dir, *tiny, "--max-steps", 2, processes=2)
    assert "data_digest" in said and "loss" in (run_dir / "focal/metrics.jsonl").read_text()
    assert "already there" in command("train_focal.py", "--run-dir", run_dir, *tiny,
                                      "--max-steps", 2)
    assert "moved since pretrain" in (run_dir / "focal/final/README.md").read_text()
    said = command("extract.py", "--run-dir", run_dir, "--stage", "focal")
    assert "of which since pretrain" in said and "features bit-equal" in said
    assert "after FOCAL" in (run_dir / "focal/encoder/README.md").read_text()
    command("repair_eval.py", "--mllm", run_dir / "focal/final", "--data", world, "--limit", 4,
            "--workers", 0)
    assert (run_dir / "focal/bench/results.json").exists()
    said = command("-m", "tools.evidence", "--run-dir", run_dir)
    assert "focal" in said and f"probe_linear.py --encoder toy-vit {run_dir}/focal/encoder" in said
    said = command("-m", "tools.plan", "train_focal", "--run-dir", run_dir, *tiny[:-4], "1x4090",
                   "--data", world)
    assert "focal: encoder at" in said and "4090" in said
    said = command("extract.py", "--run-dir", run_dir, "--stage", "local", code=1)
    assert f"no trained model at {run_dir}/local/final; trained there: focal, pretrain" in said
    said = command("gradcam.py", "--run-dir", run_dir, "--stage", "focal", "--data", world,
                   "--num-samples", 2)
    assert "share of the heat inside the object" in said


# --------------------------------------------------------------------------------------- the pages

def test_commands_of_all_pages_exist():
    """Every command and flag that README and docs/ show is one the scripts accept; every file of
    ours that a page links to is there."""
    pages, found = [ROOT / "README.md", *ROOT.glob("*/*.md")], []
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"(?:python|torchrun[^\n]*?) (\w+\.py|-m (?:tools|toy|study)[\w.]*)"
                            r"([^\n#`]*)", text)
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    assert len(pages) >= 5 and len(found) >= 20
    texts = {}
    for script, rest in found:
        words = script.split()
        if words[-1] == "toy" and rest.split()[:1] == ["pretrain"]:
            words.append("pretrain")
        if words[-1] == "tools.plan":
            stage = rest.split()[:1]
            words = [f"{stage[0]}.py"] if stage and stage[0] in STAGES else words
        key = " ".join(words)
        if key not in texts:
            texts[key] = run(*words, "--help").stdout
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in texts[key], f"{script} {flag}"


@pytest.mark.parametrize("where", ["here", "in a process of a test's own"])
def test_the_suite_opens_no_connection(where):
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    if where == "here":
        with pytest.raises(PermissionError, match="opened a connection"):
            socket.create_connection(("192.0.2.1", 80), timeout=1)
    else:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env=os.environ)
        assert "opened a connection" in done.stderr
