"""Pictures packed: a few large files with an index, in the place of millions of small files.

A *pack* is a folder whose name ends in `.pack`. It is named wherever a folder of pictures is, or
stands among files in one: `images.pack/coco/1.jpg` names a picture inside. It holds

    00000.bin, 00001.bin, …   the pictures' bytes as they were, one after another
    index.npy                 a row a picture, sorted by the name's bytes (numpy's format 1.0):
                              name    S, the longest name's length: UTF-8, parts divided by `/`
                              file    u4, number of the .bin
                              offset  u8, length u4: where its bytes stand there
                              crc     u4, their CRC-32

The index is memory-mapped and searched by halving: a process keeps none of it, and a fork or a
spawned worker shares its pages. A picture is one read at an offset. A name is looked up as it
stands, no file system sees it, so none leads out of the pack. `tools.prepare` writes packs; the
index is written last, so without one a pack is not there yet.
"""
import bisect
import functools
import io
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

ENDING, INDEX = ".pack", "index.npy"
FIELDS = {"name": "S", "file": "<u4", "offset": "<u8", "length": "<u4", "crc": "<u4"}
MAX_PICTURE = 2 ** 28       # bytes of one picture; more is no picture


class Damaged(OSError):
    """A pack that says something impossible; the message names it."""


def row_of(longest):
    """The index's dtype, for names of so many bytes at most."""
    return np.dtype([(field, f"S{longest}" if kind == "S" else kind)
                     for field, kind in FIELDS.items()])


class Pack:
    """An open pack, for any number of threads and forks."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            mapped = np.load(self.folder / INDEX, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, SyntaxError) as e:
            raise Damaged(f"{folder}: its index cannot be read ({e}); make the pack again")
        known = mapped.dtype.names == tuple(FIELDS) and mapped.ndim == 1
        if not known or mapped.dtype != row_of(mapped.dtype["name"].itemsize):
            raise Damaged(f"{folder}: {INDEX} is no index of a pack")
        self.index, self.files = mapped.view(np.ndarray), {}
        self.sorted = self.index["name"]         # a view

    def __len__(self):
        return len(self.index)

    def row(self, name):
        """The index's row of a name, or None."""
        wanted = name.encode("utf-8", "surrogateescape")
        at = bisect.bisect_left(self.sorted, wanted)
        if at < len(self.sorted) and self.sorted[at] == wanted:
            return self.index[at]
        return None

    def read(self, name):
        """The bytes of a picture; raises KeyError where there is none of that name, or Damaged."""
        row = self.row(name)
        if row is None:
            raise KeyError(name)
        return self.bytes_at(row)

    def bytes_at(self, row):
        """The bytes that a row of the index names."""
        _, number, offset, length, _ = row.item()
        if number not in self.files:             # two threads may both: one descriptor is spare
            self.files[number] = os.open(self.folder / f"{number:05d}.bin", os.O_RDONLY)
        # A length beyond bounds is cut here; pread moves no offset that a fork would share.
        raw = os.pread(self.files[number], min(length, MAX_PICTURE), offset)
        if len(raw) != length:
            raise Damaged(f"{self.folder}/{number:05d}.bin ends at a picture's middle (byte "
                          f"{offset}); copy the pack again")
        return raw

    def whole(self, row):
        """Are a row's bytes those that were packed? raises Damaged where they are not there."""
        return zlib.crc32(self.bytes_at(row)) == row["crc"]

    def names(self, folder=""):
        """The names below a folder of the pack, sorted, without the folder's own."""
        start = f"{folder}/".encode("utf-8", "surrogateescape") if folder else b""
        for name in self.sorted[bisect.bisect_left(self.sorted, start):]:
            if not name.startswith(start):
                return
            yield name[len(start):].decode("utf-8", "surrogateescape")


# ------------------------------------------------------------------------ paths that lead into one

@functools.lru_cache(4096)
def is_pack(folder):
    return os.path.isfile(os.path.join(folder, INDEX))


opened = functools.lru_cache(64)(Pack)


def split(path):
    """A path → (the pack's folder, the name inside), or None where no pack stands in it."""
    path = os.fspath(path)
    at = path.find(ENDING)
    while at >= 0:
        end = at + len(ENDING)
        if path[end:end + 1] in ("/", "") and is_pack(path[:end]):
            inside = path[end + 1:]
            plain = "//" not in inside and not inside.startswith(".") and "/." not in inside
            return path[:end], inside if plain else os.path.normpath(inside)
        at = path.find(ENDING, end)
    return None


def is_file(path):
    """os.path.isfile, also of a picture in a pack."""
    place = split(path)
    return opened(place[0]).row(place[1]) is not None if place else os.path.isfile(path)


def source(path):
    """What PIL.Image.open takes: the path itself, or the bytes of a picture in a pack, as a file;
    raises FileNotFoundError or Damaged."""
    place = split(path)
    if not place:
        return path
    try:
        return io.BytesIO(opened(place[0]).read(place[1]))
    except KeyError:
        raise FileNotFoundError(f"no {place[1]} in {place[0]}")


def open_file(path):
    """A file, or a picture in a pack, open for reading bytes."""
    found = source(path)
    return found if isinstance(found, io.BytesIO) else open(found, "rb")


def facts(path):
    """(bytes, time of the last change in ns) of a file, or of a picture in a pack: its pack's."""
    place = split(path)
    if not place:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    row = opened(place[0]).row(place[1])
    return int(row["length"]), os.stat(os.path.join(place[0], INDEX)).st_mtime_ns


class Entry(NamedTuple):
    """What os.scandir yields, of a pack."""
    name: str
    path: str
    folder: bool

    def is_file(self):
        return not self.folder

    def is_dir(self):
        return self.folder


def scandir(folder):
    """os.scandir, also of a pack or of a folder in one; nothing where there is no such folder."""
    place, seen = split(folder), set()
    if not place:
        yield from os.scandir(folder) if os.path.isdir(folder) else ()
        return
    for name in opened(place[0]).names(place[1]):
        first, below, _ = name.partition("/")
        if first not in seen:
            yield Entry(first, os.path.join(folder, first), bool(below))
        if below:
            seen.add(first)


def default_images(folder):
    """FOLDER/images, or FOLDER/images.pack where only that is there."""
    plain = f"{folder}/images"
    packed = plain + ENDING
    return packed if is_pack(packed) and not os.path.isdir(plain) else plain
