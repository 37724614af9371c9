"""What grows unit by unit, and goes on after a kill: files that are appended to, and pictures.

A command that takes hours writes into a folder of its own, WORK = HOME/prepared/NAME. After every
*unit* (a parquet file, some entries of an archive) all of it is made lasting, and journal.json in
it then says how long every file is. Killed at any moment, the next start cuts the files back to
these lengths and begins at the first unit that is not in the journal. At the end everything is
renamed to where it belongs, HOME/prepared/NAME.json says what was made from what, and WORK goes.
Until then nothing stands under its final name.
"""
import errno
import fcntl
import io
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pivot import files, images, packs
from pivot.distributed import print0

FILE_BYTES = 4 * 2 ** 30             # a .bin of a pack is closed when it has as many
ENDINGS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n", "png"), (b"GIF8", "gif"), (b"BM", "bmp"),
           (b"II*\0", "tif"), (b"MM\0*", "tif"))


def bar(total, what, done=0, unit=" rows"):
    return tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10)


def bar_over(items, what):
    return tqdm(items, what, unit="", leave=False, disable=not sys.stderr.isatty())


class Growing:
    """One command's result.

    home, name: of its folder, above; of: what it is made from, by which it is known again; moves:
    [(name in WORK, its final place), …]. finished: an earlier call has made it, and `counts` are
    that call's. raises SystemExit where it was begun or made from something else, is being made
    now, or where something else stands at a final place.
    """

    def __init__(self, home, name, of, moves):
        self.work, self.said = Path(home, "prepared", name), Path(home, "prepared", f"{name}.json")
        self.of, self.moves, self.open = json.loads(json.dumps(of)), moves, {}
        self.finished = self.said.exists()
        if self.finished:
            self.counts = files.read_json(self.said, "of")
            if self.counts.pop("of") != self.of:
                raise SystemExit(f"error: {home} holds {name} from other files or with other flags "
                                 f"({self.said} says which); name another folder")
            if gone := [place for _, place in moves if not Path(place).exists()]:
                raise SystemExit(f"error: {gone[0]} is gone; {self.said} says that it was made: "
                                 f"delete that, and what else it made, to make it again")
            shutil.rmtree(self.work, ignore_errors=True)    # it may have ended before that
            return
        journal = self.work / "journal.json"
        if not journal.exists():
            for _, place in moves:
                refuse_occupied(place)
        self.claim()
        state = files.read_json(journal, "of") if journal.exists() else {"of": self.of}
        if state["of"] != self.of:
            raise SystemExit(f"error: {self.work} was begun from other files or with other flags; "
                             f"delete it, or name them as before")
        self.done, self.sizes = state.get("done", 0), state.get("sizes", {})
        self.counts = state.get("counts", {})

    def claim(self):
        """Make WORK and lock it: two commands in one would ruin each other."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.work / "lock", "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):       # else its file system knows no locks
                raise SystemExit(f"error: another process is writing {self.work}; wait for it")

    def units(self, units):
        """Those of the units that are still to do."""
        if self.done:
            print0(f"  goes on after {self.done} of {len(units)} parts")
        return units[self.done:]

    def file(self, name):
        """A file of this name, open where its whole units end."""
        if name not in self.open:
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            there, whole = path.stat().st_size if path.exists() else 0, self.sizes.get(name, 0)
            if there < whole:
                raise SystemExit(f"error: {path} is shorter than its journal says; delete "
                                 f"{self.work} and begin anew")
            self.open[name] = open(path, "r+b" if path.exists() else "w+b")
            self.open[name].truncate(whole)
            self.open[name].seek(0, io.SEEK_END)
        return self.open[name]

    def count(self, what, n=1):
        self.counts[what] = self.counts.get(what, 0) + n

    def commit(self, verify=lambda: None):
        """A unit is whole: make it lasting, verify it, then say so in the journal."""
        for name, file in self.open.items():
            file.flush()
            os.fsync(file.fileno())
            self.sizes[name] = file.tell()
        verify()
        self.done += 1
        self.say({"of": self.of, "done": self.done, "sizes": self.sizes, "counts": self.counts},
                 self.work / "journal.json")

    def say(self, facts, path):
        """Write JSON aside, make it lasting, rename it."""
        said = json.dumps(facts, indent=1) + "\n"
        files.write_aside(path, lambda aside: aside.write_text(said, encoding="utf-8"),
                          lasting=True)

    def finish(self):
        """Rename what has grown, and say that all of it is there."""
        for file in self.open.values():
            file.close()
        for name, place in self.moves:
            if (self.work / name).exists():
                refuse_occupied(place)
                Path(place).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.work / name, place)
                files.sync(Path(place).parent)
        self.say({"of": self.of, **self.counts}, self.said)
        shutil.rmtree(self.work)

    def pictures_said(self):
        """How many pictures, and their bytes, in words."""
        said, size = f"{self.counts.get('pictures', 0):,} pictures", self.counts.get("bytes")
        if size is None:
            return f"{said}, links, which take no room"
        return f"{said}, {size / 1e9:.2f} GB" if size >= 1e8 else f"{said}, {size / 1e6:.2f} MB"


def made_of(args, sources):
    """What a result is made from: the command and its flags; sources: [[name, size], …]."""
    return {"what": args.what, "pack": args.pack, "max_side": args.max_side, "sources": sources}


def refuse_occupied(place):
    if os.path.lexists(place):
        raise SystemExit(f"error: {place} exists already and was not written by this command; move "
                         f"it away, or name another folder")


# ---------------------------------------------------------------------------------------- pictures

def ending_of(raw):
    """How the name of a picture ends, by its first bytes: load_image goes by these alone."""
    if raw[8:12] == b"WEBP":
        return "webp"
    return next((ending for start, ending in ENDINGS if raw.startswith(start)), "img")


def shrunk(raw, max_side):
    """A picture's bytes, its longer side at most so long: as they are where it is, and where the
    picture cannot be read (`prepare check` names it). A JPEG stays one, of quality 95, a WEBP
    becomes one; all else becomes a PNG."""
    try:
        with Image.open(io.BytesIO(raw)) as image:
            kind, size = image.format, image.size
        if not max_side or max(size) <= max_side:
            return raw
        image = Image.fromarray(images.load_image(raw, None, "").transpose(1, 2, 0))
    except Exception:                                  # Pillow raises nearly anything
        return raw
    width, height = image.size
    scale = max_side / max(width, height)
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))),
                         Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if kind in ("JPEG", "WEBP"):
        image.save(out, "JPEG", quality=95, subsampling=0)
    else:
        image.save(out, "PNG")
    return out.getvalue()


class Pictures:
    """Where the pictures of a growing result go: files in WORK/NAME, or, where the name ends in
    .pack, a pack. Its index grows in WORK/entries.jsonl, not yet sorted."""

    def __init__(self, growing, name):
        self.growing, self.name, self.packed = growing, name, name.endswith(packs.ENDING)
        bins = [Path(file) for file in growing.sizes if file.endswith(".bin")]
        self.number = max((int(path.stem) for path in bins), default=0)
        self.unit, self.folders = [], set()

    def add(self, name, raw):
        """A picture under a name."""
        crc, grown = zlib.crc32(raw), self.growing
        if self.packed:
            file = grown.file(f"{self.name}/{self.number:05d}.bin")
            if file.tell() + len(raw) > FILE_BYTES and file.tell():
                self.number += 1
                file = grown.file(f"{self.name}/{self.number:05d}.bin")
            row = [name, self.number, file.tell(), len(raw), crc]
            file.write(raw)
            grown.file("entries.jsonl").write(json.dumps(row).encode() + b"\n")
            self.unit.append((file.name, *row[2:]))
        else:
            path = self.path_of(name)
            path.write_bytes(raw)
            self.unit.append((path, 0, len(raw), crc))
        grown.count("pictures")
        grown.count("bytes", len(raw))

    def path_of(self, name):
        """Where a picture's own file belongs; its folder is made."""
        path = self.growing.work / self.name / name
        if path.parent not in self.folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.folders.add(path.parent)
        path.unlink(missing_ok=True)               # of a unit that was not whole
        return path

    def link(self, name, path):
        """A picture that is a file already: the same one under another name, which takes no room;
        its bytes where that cannot be (a pack, another disk)."""
        if not self.packed:
            try:
                os.link(os.path.realpath(path), self.path_of(name))
                self.growing.count("pictures")
                return
            except OSError as e:
                if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                    raise
        self.add(name, Path(path).read_bytes())

    def commit(self):
        """Growing.commit, after every picture of the unit has been read back."""
        if not self.packed:
            os.sync()                           # one call, in the place of one a picture
        self.growing.commit(self.verify)

    def verify(self):
        """Read back what this unit wrote, and compare; raises SystemExit."""
        for path, offset, length, crc in self.unit:
            with open(path, "rb") as file:
                file.seek(offset)
                if zlib.crc32(file.read(length)) != crc:
                    raise SystemExit(f"error: {path}: what was written reads otherwise (byte "
                                     f"{offset}); is the disk sound? The same command goes on")
        self.unit.clear()

    def close(self):
        """Write a pack's index; raises SystemExit for a name that came twice."""
        folder = self.growing.work / self.name
        if self.packed and folder.is_dir() and not packs.is_pack(folder):
            write_index(self.growing.work / "entries.jsonl", folder)
            packs.is_pack.cache_clear()


def write_index(entries, folder):
    """The rows of a file, [name, file, offset, length, crc] a line → the index.npy of a pack."""
    with open(entries, "rb") as file:
        count, longest = 0, 1
        for line in file:
            longest = max(longest, len(json.loads(line)[0].encode("utf-8", "surrogateescape")))
            count += 1
    index = np.zeros(count, packs.row_of(longest))
    with open(entries, "rb") as file:
        for i, line in enumerate(file):
            name, *place = json.loads(line)
            index[i] = (name.encode("utf-8", "surrogateescape"), *place)
    index = index[np.argsort(index["name"], kind="stable")]
    twice = np.flatnonzero(index["name"][1:] == index["name"][:-1])
    if len(twice):
        name = index[twice[0]]["name"].decode("utf-8", "replace")
        raise SystemExit(f"error: {folder}: two pictures are called {name}")

    def write(aside):
        with open(aside, "wb") as file:
            np.save(file, index, allow_pickle=False)
    files.write_aside(folder / packs.INDEX, write, lasting=True)
