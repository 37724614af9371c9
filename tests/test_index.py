"""Records read once: what an index holds, when it is used, and that nothing harms it."""
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

import data
from conftest import COMMON, bit_equal, killed_at, run
from pivot import checkpoints, distributed, encoders, flags, index, published, records

TEXT = {"conversations": [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]}


@pytest.fixture(scope="module")
def tools():
    tokenizer = published.open_tokenizer(encoders.resolve("toy-lm"))
    published.prepare_tokenizer(tokenizer)
    return tokenizer, Namespace(image_size=48, num_tokens=36)


@pytest.fixture
def one_process():
    """A group of one, as a stage has it."""
    distributed.start()
    yield
    distributed.dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path):
    """DATA/images, and a run folder."""
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.new("RGB", (9, 9), "red").save(tmp_path / f"images/{name}.png")
    (tmp_path / "run/sft").mkdir(parents=True)
    return tmp_path


def run_in(folder):
    """What data.Samples needs of a checkpoints.Run."""
    run = checkpoints.Run.__new__(checkpoints.Run)
    run.folder, run.index, run.bad = folder / "run/sft", folder / "run/index", []
    run.args = Namespace(stall_timeout=30)
    return run


def chat(i, **fields):
    turns = [{"from": "human", "value": f"How many, {i}?"}, {"from": "gpt", "value": f"{i} of them"}]
    return {"image": f"{'abc'[i % 3]}.png", "conversations": turns, **fields}


def write(folder, items, name="x.jsonl"):
    (folder / name).write_text("".join(
        (item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return folder / name


def read(folder, tools, *names, **options):
    sources = [(folder / name, folder / "images") for name in names or ("x.jsonl",)]
    return data.Samples("conversations", sources, *tools, 1024, **{"verbose": False, **options})


def all_of(samples):
    """Everything they hold, to compare."""
    arrays = ("ids", "roles", "offsets", "answer_tokens", "keys")
    return [*(np.array(getattr(samples, name)).tolist() for name in arrays),
            *(list(getattr(samples, name)) for name in ("where", "images", "golds")),
            samples.summary(), samples.fingerprint()]


# ------------------------------------------------------------------------------------ what it holds

def test_keys_are_those_of_every_earlier_version(tools, folder):
    """Written down when the records were still read by every process at every start: data digests
    of runs that are under way hang on them."""
    write(folder, [chat(0), TEXT, chat(1, images=["b.png"])])
    made = read(folder, tools)
    assert made.keys.tolist() == KEYS and made.fingerprint() == FINGERPRINT


KEYS = [18167023029835395363, 12335897441712867099, 17924290198988022591]
FINGERPRINT = "5564c92b9c44c52b"
KINDS = ("kept", "multi-image", "over-long", "special token in text", "bad", "kept", "unreadable")


def item_of(kind, i):
    """A record of which that becomes."""
    wrong = {"multi-image": {"image": ["a.png", "b.png"]}, "unreadable": {"image": "cut.png"},
             "over-long": {"conversations": [{"from": "human", "value": "long " * 1000},
                                             {"from": "gpt", "value": "yes"}]},
             "special token in text": {"conversations": [{"from": "human", "value": "<|im_end|>"},
                                                         {"from": "gpt", "value": "yes"}]}}
    return "{no" if kind == "bad" else chat(i, **wrong.get(kind, {}))


def drawn_by_hand(kinds, wanted, turn):
    """The rule of a draw, one record after the other: (places of those kept, {why: dropped})."""
    kept, dropped, place = [], {}, 0
    while len(kept) < wanted and place < len(kinds):
        taken = 0
        while taken < min(turn, wanted) and place < len(kinds):
            kind = kinds[place]
            if kind == "kept" and len(kept) < wanted:
                kept.append(place)
            elif kind != "kept":
                kind = "bad" if kind == "unreadable" else kind
                dropped[kind] = dropped.get(kind, 0) + 1
            taken += kinds[place] in ("kept", "over-long", "unreadable")
            place += 1
    return kept, dropped, place


@pytest.mark.parametrize("forks", [False, True])
def test_a_draw_is_that_of_a_plain_loop(tools, folder, monkeypatch, forks):
    """Whoever reads which block, and however many blocks a draw needs."""
    monkeypatch.setattr(index, "TURN", 8)
    monkeypatch.setattr(index, "LEAST", 4)
    monkeypatch.setattr(index, "WORTH", 0 if forks else 10 ** 9)
    monkeypatch.setattr(distributed, "cores", lambda: 3)
    whole = (folder / "images/a.png").read_bytes()
    (folder / "images/cut.png").write_bytes(whole[:len(whole) // 2])
    kinds = [KINDS[k] for k in np.random.default_rng(1).integers(0, len(KINDS), 60)]
    write(folder, [item_of(kind, i) for i, kind in enumerate(kinds)])
    for wanted in (None, 3, 8, 15, 500):
        order = np.arange(60) if wanted is None else np.random.default_rng(7).permutation(60)
        kept, dropped, looked = drawn_by_hand([kinds[i] for i in order], wanted or 60, 8)
        made = read(folder, tools, num_samples=wanted, seed=7, skip_bad=True)
        assert list(made.where) == [f"{folder}/x.jsonl:{order[i] + 1}" for i in kept], wanted
        assert made.dropped == dropped and (made.read, made.drawn) == (60, looked)


def test_forks_read_what_one_process_reads(tools, folder, monkeypatch):
    """Bit by bit; and the keys are digests of what is there."""
    write(folder, [TEXT if i % 7 == 0 else chat(i, url="u.jpg") for i in range(300)])
    alone = read(folder, tools)
    monkeypatch.setattr(index, "WORTH", 0)
    monkeypatch.setattr(distributed, "cores", lambda: 3)
    assert all_of(read(folder, tools)) == all_of(alone)
    for i in (0, 1, 299):
        span = slice(alone.offsets[i], alone.offsets[i + 1])
        name = os.path.basename(alone.images[i] or "")
        text = alone.ids[span].tobytes() + alone.roles[span].tobytes() + name.encode()
        assert int(alone.keys[i]) == int(hashlib.sha256(text).hexdigest()[:16], 16)
    assert alone.text_only == 43 and alone.unread == {"pictures under 'url'": 257}


# ------------------------------------------------------------------------------------ when it is used

def test_a_second_start_reads_no_record_and_no_picture(tools, folder, one_process, monkeypatch):
    """Also of what --skip-bad dropped; the data folder may be read-only."""
    (folder / "images/cut.png").write_bytes(b"\x89PNG")
    write(folder, [chat(0), "{no", chat(1, image="cut.png"), chat(2)])
    first = read(folder, tools, skip_bad=True, run=run_in(folder))
    listed = (folder / "run/sft/bad.jsonl").read_bytes()
    (folder / "run/sft/bad.jsonl").unlink()
    for name in ("read", "look"):
        monkeypatch.setattr(data.Reader, name, None)
    monkeypatch.setattr(records, "spans", None)
    second = read(folder, tools, skip_bad=True, run=run_in(folder))
    assert all_of(second) == all_of(first) and len(second) == 2
    assert (folder / "run/sft/bad.jsonl").read_bytes() == listed
    assert isinstance(second.ids, np.memmap) and not second.ids.flags.writeable


def test_whatever_changes_the_outcome_is_part_of_the_key(tools, folder, one_process, monkeypatch):
    tokenizer, encoder = tools
    path = write(folder, [chat(i) for i in range(5)])
    os.utime(path, ns=(10 ** 18, 10 ** 18))

    def folders(**options):
        read(folder, options.pop("tools", tools), run=run_in(folder), **options)
        return {p.name for p in (folder / "run/index").iterdir()}

    known = folders()
    assert folders() == known and folders(seed=3) == known          # no draw: no seed
    other = published.open_tokenizer(encoders.resolve("toy-lm"))
    published.prepare_tokenizer(other)
    assert folders(tools=(other, encoder)) == known                 # the same, opened again
    other.add_tokens(["How"])
    for options in ({"num_samples": 3}, {"num_samples": 3, "seed": 1}, {"skip_bad": True},
                    {"follow_links": True}, {"tools": (other, encoder)},
                    {"tools": (tokenizer, Namespace(image_size=48, num_tokens=37))}):
        assert len(folders(**options)) == len(known) + 1, options
        known = folders(**options)
    text = path.read_text()
    path.write_text(text.replace("3 of them", "4 of them"))         # its size stays
    os.utime(path, ns=(10 ** 18, 10 ** 18))
    assert len(folders()) == len(known) + 1
    path.write_text(text)
    os.utime(path, ns=(10 ** 18, 10 ** 18 + 1))
    assert len(folders()) == len(known) + 2
    monkeypatch.setattr(data, "__file__", __file__)                 # another rule
    assert len(folders()) == len(known) + 3


def test_of_a_large_file_blocks_are_looked_at(tmp_path, monkeypatch):
    """The first, the last, some between; what lies between those is in size and time alone."""
    monkeypatch.setattr(index, "SAMPLED", 10)
    monkeypatch.setattr(index, "BLOCKS", 4)
    path, seen = tmp_path / "x.jsonl", []
    for place in (None, 0, 9, 999, 995, 335, 500):
        raw = bytearray(b"a" * 1000)
        if place is not None:
            raw[place] = ord("b")
        path.write_bytes(raw)
        seen.append(index.file_identity(path)[2])
    assert len(set(seen[:-1])) == 6 and seen[-1] == seen[0]


def test_an_index_that_lost_bytes_is_refused(tools, folder, one_process):
    write(folder, [chat(i) for i in range(5)])
    read(folder, tools, run=run_in(folder))
    array, = (folder / "run/index").glob("*/ids")
    os.truncate(array, 8)
    with pytest.raises(SystemExit, match="ids has 8 bytes, and [0-9]+ were written; delete"):
        read(folder, tools, run=run_in(folder))


# --------------------------------------------------------------------------------- nothing harms it

def test_what_a_killed_run_left_goes_and_what_a_live_one_writes_stays(tools, folder, one_process):
    write(folder, [chat(i) for i in range(5)])
    place = folder / "run/index"
    for name in ("dead", "alive"):
        (place / f"{name}.tmp").mkdir(parents=True)
        (place / f"{name}.tmp/lock").touch()
    code = ("import fcntl, sys\nf = open(sys.argv[1], 'r+')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
            "print('locked', flush=True)\nsys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, place / "alive.tmp/lock"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    read(folder, tools, run=run_in(folder))
    assert [p.name for p in place.glob("*.tmp")] == ["alive.tmp"]
    other.communicate()


def test_an_index_is_locked_until_it_has_its_name(tools, folder, one_process, monkeypatch):
    """Or another run would take it for a dead one's."""
    write(folder, [chat(i) for i in range(5)])
    replace, seen = os.replace, []

    def looking(a, b):
        if str(a).endswith(".tmp") and (index.Path(a) / "lock").exists():
            seen.append(index.locked(index.Path(a) / "lock", "r+"))
        replace(a, b)
    monkeypatch.setattr(index.os, "replace", looking)
    read(folder, tools, run=run_in(folder))
    assert seen == [None]


def test_of_two_that_write_the_same_one_is_first(tools, folder, one_process, monkeypatch):
    write(folder, [chat(i) for i in range(5)])
    first = read(folder, tools, run=run_in(folder))
    there, = (folder / "run/index").iterdir()
    there.rename(folder / "whole")
    replace = os.replace

    def late(a, b):
        if not there.exists() and str(b) == str(there):
            (folder / "whole").rename(there)              # the other one, a moment before
        replace(a, b)
    monkeypatch.setattr(index.os, "replace", late)
    before = (folder / "whole/ids").stat().st_ino
    assert all_of(read(folder, tools, run=run_in(folder))) == all_of(first)
    assert [p for p in (folder / "run/index").iterdir()] == [there]
    assert (there / "ids").stat().st_ino == before


def test_files_that_change_meanwhile_are_refused(tools, folder, one_process, monkeypatch):
    path = write(folder, [chat(i) for i in range(5)])
    true = data.Reader.read

    def reading(self, raw):
        path.write_text(path.read_text() + json.dumps(chat(6)) + "\n")
        return true(self, raw)
    monkeypatch.setattr(data.Reader, "read", reading)
    with pytest.raises(SystemExit, match="the files changed while they were read"):
        read(folder, tools, run=run_in(folder))
    assert not list((folder / "run/index").iterdir())


def killed(share, tell):
    os.kill(os.getpid(), signal.SIGKILL)


def broken(share, tell):
    raise OSError(28, "No space left on device")


def silent(share, tell):
    time.sleep(1000)


@pytest.mark.parametrize("work, error, says", [
    (killed, SystemExit, r"a process that reads records was killed \(-9\)"),
    (broken, OSError, "No space left"), (silent, SystemExit, "nothing was read for 0.005 min")])
def test_what_befalls_one_fork_ends_all(work, error, says):
    """The others, which would go on for a quarter of an hour, too."""
    with pytest.raises(error, match=says):
        index.in_forks(lambda share, tell: (silent if share else work)(share, tell), [1, 0, 1],
                       0.005 if work is silent else 1, print)
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------- bad records

def test_all_bad_records_are_said_at_once(tools, folder, one_process):
    """The first by its reason, all in bad.jsonl; a good start takes the list away."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": 7.5}]
    write(folder, [chat(0), "{no", chat(1, conversations=turns), chat(2, image="no.png"), chat(3)])
    with pytest.raises(SystemExit) as refusal:
        read(folder, tools, run=run_in(folder))
    path = folder / "run/sft/bad.jsonl"
    assert refusal.value.code.startswith(f"error: {folder}/x.jsonl:2: not JSON (")
    assert refusal.value.code.endswith(f"(the first of 3 bad records, all of them in {path}; "
                                       f"--skip-bad drops and counts them)")
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [x["record"] for x in listed] == [f"{folder}/x.jsonl:{n}" for n in (2, 3, 4)]
    assert listed[1]["reason"] == "turn 2: 'value' is the number 7.5; write it in quotes, as it " \
        "is to be read"
    assert listed[2]["reason"].startswith("image no.png not found in")
    assert not list((folder / "run/index").iterdir())
    write(folder, [chat(0), chat(3)])
    read(folder, tools, run=run_in(folder))
    assert not path.exists()


@pytest.mark.parametrize("wanted", [None, 5])
def test_nothing_to_read_is_one_line(tools, folder, one_process, wanted):
    write(folder, [])
    with pytest.raises(SystemExit, match="no usable record in .*x.jsonl"):
        read(folder, tools, num_samples=wanted, run=run_in(folder))
    assert not list((folder / "run/index").iterdir())


def test_a_draw_says_only_what_it_looked_at(tools, folder, one_process):
    """It reads on to the end of a block; a bad record there is none of its own."""
    write(folder, [chat(i) if i % 100 else "{no" for i in range(1000)])
    order = np.random.default_rng(0).permutation(1000)
    assert (order[:20] % 100).all() and not (order[20:4 * index.LEAST] % 100).all()
    made = read(folder, tools, num_samples=20, run=run_in(folder))
    assert len(made) == made.drawn == 20 and not made.dropped


@pytest.mark.parametrize("name, raw, says", [
    ("x.parquet", b"PAR1", "parquet, and .jsonl or .json is expected: python -m tools.prepare"),
    ("x.jsonl", b"PAR1\x15\x04", "parquet, and .jsonl or .json is expected: python -m tools.prepa"),
    ("x.yaml", b"datasets:", "YAML, and .jsonl or .json is expected: python -m tools.prepare")])
def test_what_is_published_otherwise_names_the_tool(tools, folder, name, raw, says):
    (folder / name).write_bytes(raw)
    with pytest.raises(SystemExit, match=f"{name}: {says}"):
        read(folder, tools, name)


# ----------------------------------------------------------------------------------- several files

def test_several_files_are_read_one_after_the_other(tools, folder):
    a = write(folder, [chat(i) for i in range(4)], "a.jsonl")
    (folder / "b.json").write_text(json.dumps([chat(i) for i in range(4, 6)]))
    write(folder, [chat(i) for i in range(6)], "c.jsonl")
    both, turned, one = (read(folder, tools, *names) for names in (
        ("a.jsonl", "b.json"), ("b.json", "a.jsonl"), ("c.jsonl",)))
    assert both.keys.tolist() == one.keys.tolist() != turned.keys.tolist()
    assert list(both.where)[3:] == [
        f"{a}:4", f"{folder}/b.json:item 1", f"{folder}/b.json:item 2"]
    digests = {data.BatchOrder(x, 2, 2, 0, 0, 1).digest(3) for x in (both, one, turned)}
    assert len(digests) == 2


def test_a_folder_of_jsonl_and_what_is_none(folder):
    for name in ("b.jsonl", "a.jsonl", ".c.jsonl", "d.txt"):
        (folder / name).touch()
    assert records.files_of(str(folder)) == [folder / "a.jsonl", folder / "b.jsonl"]
    assert records.files_of([folder / "b.jsonl", folder]) == [
        folder / "b.jsonl", folder / "a.jsonl", folder / "b.jsonl"]
    with pytest.raises(SystemExit, match="images is a folder without a .jsonl of records in it$"):
        records.files_of(folder / "images")
    (folder / "images/x.parquet").touch()
    with pytest.raises(SystemExit, match="but parquet: python -m tools.prepare makes it"):
        records.files_of(folder / "images")
    (folder / "meta.json").touch()
    with pytest.raises(SystemExit, match=f"name {folder}/meta.json"):
        records.files_of(folder)


def test_one_file_stays_a_text_in_config():
    """A run that was begun before there could be several goes on."""
    parser = flags.Parser("")
    flags.add_two_phases(parser, "instruct")
    args = parser.parse_args(["--captions", "a", "--instruct", "b", "c"])
    assert (args.captions, args.instruct) == ("a", ["b", "c"])


# -------------------------------------------------------------------------- the stages, bit by bit

def test_cached_or_not_by_any_number_of_processes(world, fresh, tmp_path):
    """An index of one process is that of two, byte by byte; a run that reads it is one that made
    it."""
    sft = ["train_sft.py", *COMMON[2:], "--data", world, "--max-steps", 2]
    made = {}
    for name, processes, place in (("one", 1, "A"), ("again", 1, "A"), ("two", 2, "B")):
        os.makedirs(tmp_path / name)
        os.symlink(fresh / "pretrain", tmp_path / name / "pretrain")
        said = run(*sft, "--run-dir", tmp_path / name, "--index", tmp_path / place,
                   processes=processes).stdout
        assert ("kept in" in said) == (name != "again"), name
        made[place] = {p.name: p.read_bytes() for p in (tmp_path / place).glob("*/*")}
    assert made["A"] == made["B"] and len(made["A"]) == 14
    bit_equal(tmp_path / "one/sft", tmp_path / "again/sft")


def test_killed_while_it_is_written(world, fresh, tmp_path):
    """The same command then makes it anew; nothing of the first one is left or read."""
    command = ["train_sft.py", *COMMON[2:], "--data", world, "--max-steps", 1, "--run-dir", fresh]
    killed_at("before rename of pairs:1:0", tmp_path / "kill", command)
    left, = (fresh / "index").glob("pairs-*")
    assert left.suffix == ".tmp" and (left / "facts.json").exists()
    run(*command)
    made, = (fresh / "index").glob("pairs-*")
    assert made.suffix == ""
