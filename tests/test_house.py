"""The house keeps its promises: sizes, imports, one knower of processes, an honest README."""
import ast
import os
import re
import socket
import subprocess
import sys

import pytest

from conftest import ROOT, run

FILES = sorted([*ROOT.glob("*.py"), *(p for folder in ("pivot", "judge", "tools", "toy", "study")
                                      for p in (ROOT / folder).glob("*.py"))])
ALLOWED = {"torch", "transformers", "safetensors", "PIL", "numpy", "tqdm", "tokenizers"}


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_files_stay_readable():
    for path in FILES:
        text = lines(path)
        assert not [i for i, x in enumerate(text, 1) if len(x) > 100], path.name
        assert ast.get_docstring(ast.parse("\n".join(text))), path.name


def test_run_time_imports_are_the_six():
    ours = {"pivot", "judge", "tools", "toy", "study", *(p.stem for p in ROOT.glob("*.py"))}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            if path.parent.name == "study":                   # figures; lazily, and not without
                names = [name for name in names if not name.startswith("matplotlib")]
            for name in names:
                assert name.split(".")[0] in ALLOWED | ours | set(sys.stdlib_module_names), \
                    f"{path.name} imports {name}"


def test_one_module_knows_about_processes():
    for path in FILES:
        if path.name != "runtime.py":
            text = path.read_text(encoding="utf-8")
            assert "get_rank(" not in text and not re.search(r"\brank\s*[=!]=", text), path.name


def test_the_method_is_the_diff():
    """SFT and DPO run the same lines in the same order, but for the method and its reports."""
    sft, dpo = ([x.strip() for x in lines(ROOT / f"train_{s}.py")] for s in ("sft", "dpo"))
    inside = sft[sft.index("def main():"):]
    missing = [x for x in inside if x and x not in dpo]
    assert len(missing) <= 12, missing


def test_commands_of_all_pages_exist():
    """Every command and flag that README and docs/ show is one the scripts accept; every file of
    ours that a page links to is there."""
    pages, found = [ROOT / "README.md", *ROOT.glob("*/*.md")], []
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"(?:python|torchrun[^\n]*?) (\w+\.py|-m (?!pip|pytest|venv)[\w.]+)([^\n#`]*)", text)
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    assert len(pages) >= 5 and len(found) >= 20
    texts = {}
    for script, rest in found:
        if script not in texts:
            texts[script] = run(*script.split(), "--help").stdout
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in texts[script], f"{script} {flag}"


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
