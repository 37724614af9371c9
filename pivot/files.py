"""The ground floor: text and JSON files, written whole or not at all."""
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


def json_of(raw):
    """What JSON says, from bytes: in UTF-8, with or without a byte order mark; raises ValueError.
    Every JSON file is read by it."""
    return json.loads(raw.decode("utf-8").lstrip("\ufeff"))


def read_json(path, *keys, remedy=""):
    """The object in a JSON file; raises SystemExit, one line, unless it is one with these keys."""
    try:
        facts = json_of(Path(path).read_bytes())
    except OSError as e:
        raise SystemExit(f"error: cannot read {path}: {e.strerror}{remedy}")
    except (ValueError, RecursionError) as e:
        raise SystemExit(f"error: {path}: not JSON ({e}){remedy}")
    missing = [k for k in keys if k not in facts] if isinstance(facts, dict) else ["{"]
    if missing:
        raise SystemExit(f"error: {path}: no '{missing[0]}' in it{remedy}")
    return facts


def write_aside(path, write, lasting=False):
    """Let `write` make a file aside, then rename it: nobody ever sees half of it.

    write: a function of the path to write to; lasting: it is on disk before something else goes.
    """
    aside = Path(f"{path}.tmp")
    write(aside)
    if lasting:
        sync(aside)
    os.replace(aside, path)
    if lasting:
        sync(Path(path).parent)


def write_text(path, text):
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path, value, sort_keys=False):
    write_text(path, json.dumps(value, indent=1, sort_keys=sort_keys, default=str) + "\n")


@contextmanager
def new_folder(path):
    """`with new_folder(path) as aside:` an empty folder to write into, which takes the place of
    `path` at the end. If anything goes wrong before, `path` stays as it was."""
    aside = Path(f"{path}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(*aside.rglob("*"), aside)
    old = Path(f"{path}.old")
    shutil.rmtree(old, ignore_errors=True)
    if Path(path).exists():
        os.replace(path, old)
    os.replace(aside, path)
    sync(Path(path).parent)                          # before what was there goes
    shutil.rmtree(old, ignore_errors=True)


def from_folder(folder, path):
    """A path that was written down as it is seen from a folder: `x`, or `../other/x`, also where
    the folder is not there yet, or is a link."""
    if Path(path).name == str(path):
        return Path(folder, path)
    return Path(os.path.normpath(Path(folder).resolve() / path))


def sync(*paths):
    """fsync files and folders, so that a rename means "on disk"."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def sha256(*files):
    """Of the files' bytes, one after the other (16 hex digits)."""
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: sha)
    return sha.hexdigest()[:16]
