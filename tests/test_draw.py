"""tools.draw: which answers make a pair, the same pairs on two processes and after a kill; a stage
reads them, and DPO's reference finds the log-probs that they name."""
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from safetensors.torch import load_file

from conftest import COMMON, ROOT, copied, run
from pivot import packs
from tools import draw

# What an untrained model says is never right. So this rule counts letters.
SCRIPT = f"""import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from tools import draw
draw.RULES["exact"] = lambda said, gold: float(sum(map(str.isalpha, said)) % 3 == 0)
killed = bool(os.environ.get("KILL"))
sys.argv = ["killed.py"] * killed + [{str(ROOT / "tools/draw.py")!r}, *sys.argv[1:]]
runpy.run_path({str(ROOT / "tests/killed.py")!r} if killed else sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("worth, stopped, texts, pair", [
    ([0, 1, 0, 1], [1, 1, 1, 1], "abcd", [1, 0]),                  # the first of each
    ([0, 1, 0, 1], [0, 0, 1, 1], "abcd", [3, 2]),                  # what was cut off is neither
    ([1, 1, 0, 0], [0, 0, 1, 1], "abcd", None),
    ([1, 0.6, 0, 0.9], [1, 1, 1, 1], "abcd", [0, 2]),              # nor what is half right
    ([1, 0.6], [1, 1], "ab", None), ([1, 1], [1, 1], "ab", None), ([0, 0], [1, 1], "ab", None),
    ([1, 0, 0, 0], [1, 1, 1, 1], ["a", " \n", "b<image>", "c"], [0, 3])])
def test_which_answers_make_a_pair(worth, stopped, texts, pair):
    assert draw.pair_of(list(texts), list(map(bool, stopped)), worth, {"<image>"}) == pair


@pytest.fixture(scope="module")
def asked(world, tmp_path_factory):
    """Two sets of pairs, whose pictures lie in a folder and in a pack, and the script that draws.
    """
    folder, sets = tmp_path_factory.mktemp("draw"), {}
    for kind in ("colour", "count"):
        root = folder / "pictures" / kind
        root.mkdir(parents=True)
        lines = (world / f"preferences/annotations/{kind}.jsonl").read_text().splitlines()[:12]
        for line in lines:
            shutil.copy(world / "preferences/images" / json.loads(line)["image"], root)
        (folder / f"{kind}.jsonl").write_text("\n".join(lines))
        sets[kind] = {"root": f"pictures/{kind}", "annotation": f"{kind}.jsonl"}
    run("-m", "tools.prepare", "pack", root, f"{root}.pack")
    shutil.rmtree(root)
    sets["count"]["root"] += ".pack"
    (folder / "meta.json").write_text(json.dumps(sets))
    (folder / "script.py").write_text(SCRIPT)
    return folder


def command(asked, run_folder, *more):
    return [asked / "script.py", run_folder, "--preferences", asked / "meta.json", "--group", 6,
            "--max-new-tokens", 20, "--micro-batch", 4, "--workers", 0, *more]


@pytest.fixture(scope="module")
def drawn(asked, stage1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "run"
    copied(stage1, folder)
    return folder, run(*command(asked, folder)).stdout


def is_right(answer):
    return sum(c.isalpha() for c in answer) % 3 == 0


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_pairs_and_the_table_are_the_answers(drawn, asked):
    """Counted anew from the answers: what is right, which two were taken, what was left out."""
    folder, said = drawn
    out = folder / "drawn/pretrain"
    groups = {x["item"]: x for x in lines_of(out / "answers.0.jsonl")}
    assert sorted(groups) == list(range(24))
    rights, kinds, taken = 0, Counter(), []
    for _, line in sorted(groups.items()):
        worth = [s and is_right(a) for a, s in zip(line["answers"], line["stopped"])]
        assert worth == line["rewards"]
        rights += sum(worth)
        ends = [a for a, s in zip(line["answers"], line["stopped"]) if s and a.strip()]
        right, wrong = ([a for a in ends if is_right(a) is x] for x in (True, False))
        kind = "all_right" if all(worth) else "none_right" if not any(worth) else \
            "pairs" if right and wrong else "no_pair"
        kinds[kind] += 1
        if kind == "pairs":
            taken.append((right[0], wrong[0], sum(worth) / 6))
    facts = json.loads((out / "results.json").read_text())
    assert {k: facts[k] for k in kinds} == kinds
    assert sum(kinds.values()) == facts["questions"] == 24 and kinds["pairs"] > 4
    assert facts["right"] == facts["reward"] == rights / 144
    pairs = lines_of(out / "pairs.jsonl")
    assert [(x["chosen"], x["rejected"], x["reward"]) for x in pairs] == taken
    known = {(f"{root}/{x['image']}", x["question"]) for root in ("colour", "count.pack")
             for x in lines_of(asked / f"{root.removesuffix('.pack')}.jsonl")}
    assert {(x["image"], x["question"]) for x in pairs} <= known
    assert all(packs.is_file(out / "images" / x["image"]) for x in pairs)
    assert re.search(rf"right and wrong among 6 +{kinds['pairs']}\n", said)
    assert f"python train_dpo.py --run-dir {folder} --preferences {out}/pairs.jsonl" in said


def test_killed_and_gone_on_with_by_two_processes_they_are_the_same(drawn, asked, tmp_path,
                                                                    monkeypatch):
    """Killed where a third batch is drawn and not yet written, its last line cut off besides."""
    one, folder = drawn[0] / "drawn/pretrain", tmp_path / "run"
    shutil.copytree(drawn[0] / "pretrain", folder / "pretrain")
    script = asked / "killed.py"
    script.write_text(SCRIPT.replace("killed = ", "os.environ |= {'KILL': 'before a group is scored"
                                     f":3:0', 'KILL_MARK': {str(tmp_path / 'mark')!r}}}\nkilled = "))
    done = run(script, *command(asked, folder)[1:], check=False)
    assert done.returncode == -9, done.stderr
    two = folder / "drawn/pretrain"
    assert len(lines_of(two / "answers.0.jsonl")) == 8 and not (two / "pairs.jsonl").exists()
    with open(two / "answers.0.jsonl", "r+") as file:
        file.truncate((two / "answers.0.jsonl").stat().st_size - 9)
    assert "7 of 24 questions were answered before" in run(*command(asked, folder),
                                                           processes=2).stdout
    assert len(list(two.glob("answers.*.jsonl"))) == 2
    for name in ("pairs.jsonl", "results.json", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert draw.stored(one) == draw.stored(two)


def test_an_answer_hangs_on_seed_and_item_alone(drawn, asked, tmp_path):
    """Not on what is drawn beside it, nor on other questions. Another seed gives others."""
    def pairs(*more):
        out = tmp_path / "-".join(map(str, more))
        run(*command(asked, drawn[0], "--out", out, *more))
        return {(x["image"], x["question"]): x for x in lines_of(out / "pairs.jsonl")}
    ours, few = pairs("--micro-batch", 7), pairs("--preferences", asked / "count.jsonl",
                                                 "--images", asked / "pictures/count.pack")
    known = lines_of(drawn[0] / "drawn/pretrain/pairs.jsonl")
    assert len(known) == len(ours)
    for x in known:
        y = ours[x["image"], x["question"]]
        assert [x["chosen"], x["rejected"]] == [y["chosen"], y["rejected"]]
        assert abs(x["chosen_logps"] - y["chosen_logps"]) < 1e-4
    said = {x["image"]: x["chosen"] for x in known if x["image"].startswith("count.pack/")}
    assert {image: x["chosen"] for (image, _), x in few.items()} == said != {}
    assert pairs("--seed", 1).keys() != ours.keys()


def test_stages_read_them_and_dpos_reference_is_their_log_prob(drawn):
    """The table of another program, of the texts in pairs.jsonl, tokenised and laid out anew. (A
    stage reads pairs in the order of a seeded shuffle.)"""
    folder, _ = drawn
    path = folder / "drawn/pretrain/pairs.jsonl"
    more = [*COMMON, "--global-batch", 4, "--run-dir", folder, "--preferences", path,
            "--max-steps", 1]
    run("train_dpo.py", *more, "--heldout", "none")
    pairs = lines_of(path)
    table = load_file(folder / "dpo/ref_logps.safetensors")["pairs"].numpy()
    shuffled = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    ours = np.array([[x["chosen_logps"], x["rejected_logps"]] for x in shuffled])
    assert table.shape == ours.shape and np.abs(table - ours).max() < 1e-4
    assert np.abs(table - ours[:, ::-1]).max() > 0.1
    assert "wrote" in run("train_mpo.py", *more, "--heldout", "none").stdout
    assert "wrote" in run("train_sft.py", *more).stdout


def test_other_settings_and_other_folders_are_refused(drawn, asked, tmp_path):
    folder, _ = drawn

    def refused(*more):
        done = run(*command(asked, folder, *more), check=False)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith("error: ") and "Trace" not in done.stderr
        return last
    assert "(seed: 0, now 1); --overwrite deletes them" in refused("--seed", 1)
    (tmp_path / "mine.txt").write_text("precious")
    assert "holds something else" in refused("--out", tmp_path, "--overwrite")
    assert (tmp_path / "mine.txt").exists()
    assert "holds something else" in refused("--out", folder / "pretrain", "--overwrite")
    assert (folder / "pretrain/metrics.jsonl").exists()
    assert "make it with:  python train_grpo.py" in refused("--stage", "grpo")
