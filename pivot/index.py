"""Records read once: tokens, names and counts in flat arrays on disk, which all processes of this
start, and later starts, map into memory.

The first start reads the files with all cores of all processes, each a share, and writes
INDEX/KIND-KEY/: a file for each array, facts.json with the counts, bad.json with the records that
--skip-bad dropped. It is written aside, fsynced and renamed, so that nobody ever opens half of it;
of two runs that write the same at once one is first, and both open that. INDEX is RUN/index, or
what --index names. It can be deleted while no run uses it: the next start writes it again.

KEY is a digest of all that decides what comes out: names, sizes, times and contents of the files,
tokenizer, chat template, the rules (the code of them), length bounds, flags, seed and number of
samples. What goes unnoticed:
* a change inside a file of over 4 MB that keeps its size and its time and lies between the 64
  blocks of 64 KB of which the digest is made;
* a change of the pictures. Nobody looks at them again: one that is lost or broken since is met when
  it is trained on; one that is mended since stays dropped, where --skip-bad dropped it.
Delete the index in such a case.
"""
import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
import uuid
from array import array
from collections import Counter
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers
from tqdm import tqdm

from pivot import distributed, files, records
from pivot.distributed import print0

SAMPLED, BLOCKS = 2 ** 16, 64    # bytes of a block, blocks of a file, of which its digest is made
MOST, LEAST = 4096, 64           # records that are read in one go
TURN = 1024                      # usable records that a draw takes at a time
WORTH = 2048                     # records of a process for which forks are worth their start
STATES = ("kept", "over-long", "bad", "bad", "multi-image", "special token in text",
          "without a gold answer")
# Up to UNREADABLE a record is usable, which is what a draw counts.
KEPT, OVER_LONG, UNREADABLE, BAD, MULTI_IMAGE, SPECIAL_TOKEN, NO_GOLD = range(len(STATES))
# The arrays: n samples, their tokens one after the other, and texts, each with its offsets (n + 1).
ARRAYS = {"ids": np.int32, "roles": np.int8, "offsets": np.int64, "answer_tokens": np.int64,
          "keys": np.uint64}
TEXTS = ("where", "images", "golds")


@dataclass
class Outcome:
    """What became of one record: its state; record and parts, [(ids of a piece, its role), …], of a
    kept one; why it is bad; what of it nobody reads, in words."""
    where: str
    state: int = KEPT
    record: records.Record | None = None
    parts: list = ()
    why: str | None = None
    unread: list = ()


class Texts:
    """Texts one after the other in a flat array: texts[i] → str, None where it is empty."""

    def __init__(self, characters, offsets):
        self.characters, self.offsets = characters, offsets

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]                          # from the end, too; or raises IndexError
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.characters[span].tobytes().decode("utf-8", "surrogateescape") or None


# --------------------------------------------------------------------------------------- the table

def table(reader, sources, num_samples=None, seed=0, run=None, shown=False):
    """All samples: arrays, texts and counts, from the index, or made first; raises SystemExit, one
    line, where records are bad or none is usable. Arguments: data.Samples; reader: data.Reader."""
    if run is None:
        with tempfile.TemporaryDirectory(prefix="pivot-") as folder:
            build(Group(False), reader, sources, num_samples, seed, Path(folder), None, shown)
            made = opened(Path(folder), in_memory=True)
    else:
        made = opened(made_folder(reader, sources, num_samples, seed, run, shown))
        run.list_bad(made.bad)
    if made.bad and shown:
        more = f"\n  and {len(made.bad) - 3} more" if len(made.bad) > 3 else ""
        print0("\n".join(f"  dropped: {why}" for _, why in made.bad[:3]) + more)
    return made


def made_folder(reader, sources, num_samples, seed, run, shown):
    """The folder of the index, which is there, or is made by all processes together."""
    group, began = Group(True), time.monotonic()
    made_from = group.on_main(lambda: identity_of(reader, sources, num_samples, seed))
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    folder = run.index / f"{reader.kind}-{key}"
    if not group.on_main(folder.exists):
        aside = Aside(folder)

        def publish():
            if [file_identity(file) for file, _ in sources] != made_from["files"]:
                raise SystemExit("error: the files changed while they were read; start again")
            aside.publish()
        try:
            path = group.on_main(aside.make)
            build(group, reader, sources, num_samples, seed, path, run, shown)
            group.on_main(publish)
        except BaseException:
            aside.remove()
            raise
        if shown:
            print0(f"  {reader.kind}: read in {time.monotonic() - began:.0f} s, and kept in "
                   f"{folder} for the next start")
    if not all(distributed.gather(folder.exists())):
        raise SystemExit(f"error: {folder} is not there for every process of this run: --index "
                         f"must name a folder that all of them see")
    return folder


def opened(folder, in_memory=False):
    """A folder that `build` has written → its arrays by their names, the texts as Texts, and the
    counts. in_memory: it may go then; else arrays are mapped, for reading."""
    facts = files.read_json(folder / "facts.json", "bytes", remedy=f"; delete {folder}")

    def flat(name, dtype):
        path, size = folder / name, facts["bytes"][name]
        there = path.stat().st_size if path.exists() else None
        if there != size:
            raise SystemExit(f"error: {path} has {there} bytes, and {size} were written; delete "
                             f"{folder}: the same command makes it anew")
        return np.fromfile(path, dtype) if in_memory or not size else np.memmap(path, dtype, "r")

    made = {name: flat(name, dtype) for name, dtype in ARRAYS.items()}
    made["answer_tokens"] = np.array(made["answer_tokens"])      # torch wants it writable
    made |= {name: Texts(flat(name, np.uint8), flat(f"{name}.offsets", np.int64)) for name in TEXTS}
    return SimpleNamespace(**made, **facts["counts"],
                           bad=files.json_of((folder / "bad.json").read_bytes()))


# ------------------------------------------------------------------------------------- which index

def identity_of(reader, sources, num_samples, seed):
    """All that decides what an index holds: {what: its identity}. The docstring above says what it
    does not see."""
    return {**reader.depends_on(),
            "files": [file_identity(file) for file, _ in sources],
            "names": [str(Path(file)) for file, _ in sources],
            "roots": [(os.path.join(os.getcwd(), root), os.path.realpath(root))
                      for _, root in sources],
            "num_samples": num_samples, "seed": None if num_samples is None else seed}


def file_identity(path):
    """Size, time and a digest of some blocks of a file, the first and the last among them."""
    path = records.require_file(path)
    with open(path, "rb", buffering=0) as file:
        facts, sha = os.fstat(file.fileno()), hashlib.sha256()
        last = max(0, facts.st_size - SAMPLED)
        starts = range(0, facts.st_size, SAMPLED) if last < BLOCKS * SAMPLED else \
            np.linspace(0, last, BLOCKS).astype(int).tolist()
        for start in starts:
            sha.update(os.pread(file.fileno(), SAMPLED, start))
    return [facts.st_size, facts.st_mtime_ns, sha.hexdigest()]


def tokenizer_digest(tokenizer):
    """The identity of a tokenizer: of all that its own file says, its words where it has none."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        said = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:                                # its first use resets these two
        said = json.loads(fast.to_str()) | {"truncation": None, "padding": None}
    said = json.dumps([tokenizers.__version__, said])
    return hashlib.sha256(said.encode()).hexdigest()


# ------------------------------------------------------------------------------------------ making

class Group:
    """The processes that read together: all of this run, or one alone."""

    def __init__(self, together):
        self.together = together
        self.me, self.size = distributed.world() if together else (0, 1)

    def on_main(self, make):
        """A value that the main process makes for all, when all are here; what it refuses is
        refused by all."""
        if not self.together:
            return make()

        def attempt():
            try:
                return make(), None
            except SystemExit as e:
                return None, e.code
        distributed.barrier()
        value, refusal = distributed.from_main(attempt)
        if refusal:
            raise SystemExit(refusal)
        return value

    def lanes(self):
        """(the first of mine, how many are mine, how many there are): each core of each process."""
        cores = distributed.cores()
        every = distributed.gather(cores) if self.together else [cores]
        return sum(every[:self.me]), cores, sum(every)


class Aside:
    """A new folder beside `folder`, of this run alone, which then takes its name. What killed runs
    left there goes: a lock, which ends with its process, says which of them live."""

    def __init__(self, folder):
        self.folder, self.path = folder, None

    def make(self):
        """→ its path. By the main process alone."""
        place = self.folder.parent
        place.mkdir(parents=True, exist_ok=True)
        for left in place.glob("*.tmp"):
            if locked(left / "lock", "r+"):
                shutil.rmtree(left, ignore_errors=True)
        unlocked = place / f"new-{uuid.uuid4().hex[:8]}"      # which nobody takes for a dead run's
        unlocked.mkdir()
        self.lock = locked(unlocked / "lock", "w")
        self.path = unlocked.rename(f"{self.folder}.{unlocked.name[4:]}.tmp")
        return self.path

    def publish(self):
        files.sync(*self.path.iterdir(), self.path)
        try:
            os.replace(self.path, self.folder)
        except OSError:
            if not self.folder.exists():
                raise
            self.remove()                            # another run was first, with the same
        files.sync(self.folder.parent)

    def remove(self):
        if self.path:
            shutil.rmtree(self.path, ignore_errors=True)


def locked(path, mode):
    """An open file under this process's lock; None where another has it, or nobody can. flock: it
    outlives that the file is opened and closed a second time, to be fsynced."""
    try:
        file = open(path, mode)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError:
        return None


def build(group, reader, sources, num_samples, seed, aside, run, shown):
    """Read the records, all processes a share, and write arrays and counts into the folder `aside`;
    raises SystemExit where records are bad or none is usable.

    A draw reads on, a quarter of what is wanted at a time, until there are enough.
    """
    total = group.on_main(lambda: list_records(sources, aside))
    if num_samples is None:
        order, wanted, step = np.arange(total), total, total
    else:
        order, wanted = np.random.default_rng(seed).permutation(total), num_samples
        step = max(4 * LEAST, wanted // 4)
    first, mine, lanes = group.lanes()
    patience = run.args.stall_timeout if run else 30
    blocks, end, looked = [], 0, None
    with tqdm(total=min(wanted, total), desc=f"reading {reader.kind}", unit=" records",
              disable=not shown, leave=False) as bar:
        while looked is None:
            begin, end = end, min(total, end + step)
            size = max(LEAST, min(MOST, math.ceil((end - begin) / (4 * lanes))))
            these = [range(i, min(i + size, end)) for i in range(begin, end, size)]
            blocks += [block.start for block in these]
            shares = [[(block.start, order[block.start:block.stop]) for block in these[lane::lanes]]
                      for lane in range(first, first + mine)]
            read_shares(reader, sources, aside, shares, patience, bar)
            if num_samples is not None:
                looked = group.on_main(lambda: looked_at(states_of(aside, blocks), wanted))
            if looked is None and end == total:
                looked = total
    group.on_main(lambda: merge(reader, sources, aside, blocks, looked, wanted, total, run))


def list_records(sources, aside):
    """Write where the records are: records.npy, (n, 4): source, number, first byte, bytes. → n."""
    found = array("q")
    for source, (file, _) in enumerate(sources):
        for span in records.spans(file):
            found.extend((source, *span))
    found = np.array(found, np.int64).reshape(-1, 4)
    np.save(aside / "records.npy", found)
    return len(found)


def read_shares(reader, sources, aside, shares, patience, bar):
    """Read the blocks, [(name, places in records.npy), …] for each core, and write each to a file
    of its name; with a fork for each core, where that is worth it."""
    def work(blocks, tell):
        listed = np.load(aside / "records.npy", mmap_mode="r")
        opened_files = [open(file, "rb", buffering=0) for file, _ in sources]
        for name, places in blocks:
            raw = [raw_record(sources, opened_files, *listed[place].tolist()) for place in places]
            np.savez(aside / f"{name}.npz", **arrays_of(reader.read(raw)))
            tell(len(places))

    shares = [blocks for blocks in shares if blocks]
    count = sum(len(places) for blocks in shares for _, places in blocks)
    if len(shares) > 1 and count >= (WORTH // 32 if reader.skip_bad else WORTH):
        in_forks(work, shares, patience, bar.update)
    else:
        for blocks in shares:
            work(blocks, bar.update)


def raw_record(sources, opened_files, source, number, first, length):
    """→ (where, bytes, image root), as data.Reader takes it."""
    file, root = sources[source]
    raw = os.pread(opened_files[source].fileno(), length, first)
    if len(raw) != length:
        raise SystemExit(f"error: {file} changed while it was read; start again")
    return records.name_of(file, number), raw, root


def arrays_of(outcomes):
    """What became of some records, one after the other → {name: array}."""
    kept = [one for one in outcomes if one.state == KEPT]
    ids, roles, lengths, answer_tokens, keys = array("i"), array("b"), [], [], []
    for one in kept:
        begin = len(ids)
        for piece, role in one.parts:
            ids.extend(piece)
            roles.frombytes(bytes([role]) * len(piece))
        lengths.append(len(ids) - begin)
        answer_tokens.append(sum(len(piece) for piece, role in one.parts if role == records.ANSWER))
        name = os.path.basename(one.record.image or "")
        text = ids[begin:].tobytes() + roles[begin:].tobytes() + name.encode()
        keys.append(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))
    notes = {"bad": [(i, one.where, one.why) for i, one in enumerate(outcomes) if one.why],
             "unread": [(i, what) for i, one in enumerate(outcomes) for what in one.unread]}
    arrays = {"states": np.array([one.state for one in outcomes], np.int8),
              "ids": np.array(ids, np.int32), "roles": np.array(roles, np.int8),
              "lengths": np.array(lengths, np.int64), "keys": np.array(keys, np.uint64),
              "answer_tokens": np.array(answer_tokens, np.int64),
              "notes": np.frombuffer(json.dumps(notes).encode(), np.uint8)}
    for name, texts in (("where", [one.where for one in kept]),
                        ("images", [one.record.image or "" for one in kept]),
                        ("golds", [one.record.gold or "" for one in kept])):
        texts = [text.encode("utf-8", "surrogateescape") for text in texts]
        arrays[name] = np.frombuffer(b"".join(texts), np.uint8)
        arrays[f"{name}.lengths"] = np.array([len(text) for text in texts], np.int64)
    return arrays


def states_of(aside, blocks):
    """What became of all records so far, (n,), in the order in which they are drawn."""
    parts = []
    for name in blocks:
        with np.load(aside / f"{name}.npz") as block:
            parts.append(block["states"])
    return np.concatenate([np.zeros(0, np.int8), *parts])


def looked_at(states, wanted):
    """How many records a draw of `wanted` looks at and counts; None: there are not yet enough.
    states: (n,). It takes usable ones in turns of TURN, or of as many as are wanted, if fewer."""
    usable, turn = np.flatnonzero(states <= UNREADABLE), min(TURN, wanted)
    kept = np.cumsum(states[usable] == KEPT)[turn - 1::turn]           # after each turn
    enough = np.flatnonzero(kept >= wanted)
    return int(usable[(enough[0] + 1) * turn - 1]) + 1 if len(enough) else None


def merge(reader, sources, aside, blocks, looked, wanted, total, run):
    """Put the blocks of the records that were looked at together: flat arrays and counts."""
    states = states_of(aside, blocks)[:looked]
    bad, unread = notes_of(aside, blocks, looked)
    dropped = Counter(STATES[state] for state in states[states != KEPT].tolist())
    if bad and not reader.skip_bad:
        refuse(bad, run)
    if not (states == KEPT).any():
        raise SystemExit(f"error: no usable record in {sources[0][0]} (dropped: {dict(dropped)})")
    names = ["ids", "roles", "answer_tokens", "keys", *TEXTS]        # and offsets, below
    lengths, left = {name: [[0]] for name in ("ids", *TEXTS)}, wanted
    with contextlib.ExitStack() as stack:
        out = {name: stack.enter_context(open(aside / name, "wb")) for name in names}
        for name in blocks:
            with np.load(aside / f"{name}.npz") as block:
                left -= append(block, out, lengths, min(len(block["lengths"]), left))
    for name, parts in lengths.items():
        offsets = np.concatenate(parts).cumsum(dtype=np.int64)
        offsets.tofile(aside / ("offsets" if name == "ids" else f"{name}.offsets"))
    for path in (aside / "records.npy", *(aside / f"{name}.npz" for name in blocks)):
        path.unlink()
    text_only = sum(int((part == 0).sum()) for part in lengths["images"][1:])
    files.write_json(aside / "bad.json", bad)
    files.write_json(aside / "facts.json", {
        "counts": {"read": total, "drawn": looked, "text_only": text_only, "dropped": dropped,
                   "unread": unread},
        "bytes": {name: (aside / name).stat().st_size for name in (
            *ARRAYS, *TEXTS, *(f"{text}.offsets" for text in TEXTS))}})


def append(block, out, lengths, count):
    """Append the first `count` samples of a block to the files; → count."""
    ends = {name: block["lengths" if name == "ids" else f"{name}.lengths"][:count]
            for name in lengths}
    for name, file in out.items():
        like = "ids" if name == "roles" else name          # a role for each token
        stop = int(ends[like].sum()) if like in ends else count
        file.write(block[name][:stop].tobytes())
    for name, part in ends.items():
        lengths[name].append(part)
    return count


def notes_of(aside, blocks, looked):
    """([(where, why), …] of bad records, {what nobody reads: how often}) of those looked at."""
    bad, unread = [], Counter()
    for start in blocks:
        with np.load(aside / f"{start}.npz") as block:
            notes = files.json_of(block["notes"].tobytes())
        bad += [(where, why) for i, where, why in notes["bad"] if start + i < looked]
        unread.update(what for i, what in notes["unread"] if start + i < looked)
    return bad, unread


def refuse(bad, run):
    """Raise SystemExit: the first bad record, how many there are, and where all are listed."""
    listed = ""
    if run:
        run.list_bad(bad)
        listed = f", all of them in {run.folder / 'bad.jsonl'}"
    many = "the only bad record" if len(bad) == 1 else f"the first of {len(bad)} bad records"
    raise SystemExit(f"error: {bad[0][1]}  ({many}{listed}; --skip-bad drops and counts them)")


# ------------------------------------------------------------------------------------------- forks

def in_forks(work, shares, patience, tell):
    """work(share, tell) for each share in a fork of this process; tell(n): so many more are done.

    What is raised in one is raised here; raises SystemExit where one is killed, or where all are
    silent for `patience` minutes. However this ends, the forks end with it.
    """
    context, forks = multiprocessing.get_context("fork"), {}
    try:
        for share in shares:
            ours, theirs = context.Pipe(duplex=False)
            fork = context.Process(target=fork_main, args=(work, share, theirs, os.getpid()))
            fork.start()
            theirs.close()
            forks[ours] = fork
        while forks:
            ready = connection.wait(forks, 60 * patience)
            if not ready:
                raise SystemExit(f"error: nothing was read for {patience:g} min "
                                 f"(--stall-timeout); does the disk answer?")
            for pipe in ready:
                hear(pipe, forks, tell)
    finally:
        for fork in forks.values():
            fork.kill()
            fork.join()


def hear(pipe, forks, tell):
    """What a fork says: how much it did, what it raised, or, at its end, nothing more."""
    try:
        said = pipe.recv()
    except EOFError:
        fork = forks.pop(pipe)
        fork.join()
        if fork.exitcode:
            raise SystemExit(f"error: a process that reads records was killed "
                             f"({fork.exitcode}); out of memory? The same command begins again")
        return
    if isinstance(said, BaseException):
        raise said
    tell(said)


def fork_main(work, share, pipe, trainer):
    """In the fork. os._exit: what the trainer has open is not this process's to close."""
    distributed.begin_worker(trainer, 0)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"   # its threads are not in a fork: it would hang
    code = 0
    try:
        work(share, pipe.send)
    except BaseException as e:
        e.add_note(traceback.format_exc())
        pipe.send(e)
        code = 1
    os._exit(code)
