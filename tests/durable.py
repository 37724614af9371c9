"""Run a command and write down, in order, what it makes lasting and what it deletes.

    DURABLE=file python durable.py extract.py --run-dir …

A line of the file is [what, path]: ["fsync", …], ["rename", from, to], ["delete", …].
"""
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.argv = sys.argv[1:]
log = open(os.environ["DURABLE"], "a", buffering=1)
fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree


def noted(*what):
    log.write(json.dumps([str(x) for x in what]) + "\n")


def noting_fsync(descriptor):
    noted("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
    fsync(descriptor)


def noting_replace(a, b, **more):
    held = [str(p) for p in Path(a).rglob("*") if p.is_file()] if Path(a).is_dir() else []
    noted("rename", Path(a).resolve(), Path(b).resolve(), *held)
    replace(a, b, **more)


def noting_rmtree(path, *rest, **more):
    if Path(path).exists():
        noted("delete", Path(path).resolve())
    rmtree(path, *rest, **more)


os.fsync, os.replace, shutil.rmtree = noting_fsync, noting_replace, noting_rmtree
runpy.run_path(sys.argv[0], run_name="__main__")
