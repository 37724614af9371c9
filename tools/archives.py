"""Where many pictures come from: zip archives, in one part or in several, read as they lie there,
not joined on disk; and folders."""
import io
import os
import string
import zipfile
import zlib
from itertools import product
from pathlib import Path
from typing import NamedTuple

from pivot import records
from pivot.packs import MAX_PICTURE


class Joined(io.RawIOBase):
    """Files one after another, as one that can be read and sought."""

    def __init__(self, paths):
        self.files = [open(path, "rb") for path in paths]
        self.ends, self.at = [], 0
        for path in paths:
            self.ends.append((self.ends[-1] if self.ends else 0) + Path(path).stat().st_size)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.ends[-1]}[whence]
        self.at = begin + offset
        return self.at

    def readinto(self, buffer):
        number = next((i for i, end in enumerate(self.ends) if self.at < end), None)
        if number is None:
            return 0
        file, room = self.files[number], self.ends[number] - self.at
        file.seek(self.at - (self.ends[number - 1] if number else 0))
        got = file.readinto(memoryview(buffer)[:room])
        self.at += got
        return got

    def close(self):
        for file in self.files:
            file.close()
        super().close()


def parts_of(path):
    """images.zip → [images.zip], or its parts, [images.zip_aa, images.zip_ab, …], in order; raises
    SystemExit where it, or a part between two, is missing."""
    path = Path(path)
    if path.is_file():
        return [path]
    there = {p.name.removeprefix(f"{path.name}_") for p in path.parent.glob(f"{path.name}_*")}
    if not there:
        raise SystemExit(f"error: {path} is missing; download it, then the same command goes on")
    width = len(next(iter(there)))
    order = ["".join(letters) for letters in product(string.ascii_lowercase, repeat=width)]
    expected = order[:len(there)]
    if there != set(expected):
        missing = next(name for name in order if name not in there)
        raise SystemExit(f"error: {path}_{missing} is missing beside {path}_{max(there)}; download "
                         f"it, then the same command goes on")
    return [path.with_name(f"{path.name}_{name}") for name in expected]


class Archive:
    """A zip archive. entries: its files, in order; raises SystemExit, naming it, where it is cut
    short or where a name leads out of it."""

    def __init__(self, path):
        parts = parts_of(path)
        self.name = path.name
        self.path = path if parts == [path] else f"{path}_*"
        try:
            self.zip = zipfile.ZipFile(io.BufferedReader(Joined(parts), 2 ** 20))
        except (zipfile.BadZipFile, OSError, ValueError) as e:
            raise SystemExit(f"error: {self.path} is not a whole zip archive ({e}); is its last "
                             f"part missing, or cut short? Download it again, then the same "
                             f"command goes on")
        self.entries = [entry for entry in self.zip.infolist() if not entry.is_dir()]
        for entry in self.entries:
            if entry.filename.startswith("/") or ".." in entry.filename.split("/"):
                raise SystemExit(f"error: {self.path}: its entry {entry.filename!r} leads out of "
                                 f"the folder; nothing was unpacked from it")

    def read(self, entry):
        """The bytes of one entry."""
        if entry.file_size > MAX_PICTURE:
            raise SystemExit(f"error: {self.path}: {entry.filename} has {entry.file_size} bytes: "
                             f"no picture")
        return b"".join(self.pieces(entry))

    def pieces(self, entry):
        """Yield the bytes of one entry, piece by piece, its CRC-32 compared; raises SystemExit."""
        try:
            with self.zip.open(entry) as file:
                while piece := file.read(2 ** 20):
                    yield piece
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError,
                NotImplementedError) as e:
            raise SystemExit(f"error: {self.path}: {entry.filename} cannot be unpacked ({e}); "
                             f"download the archive again, then the same command goes on")


class Entry(NamedTuple):
    filename: str


class Folder:
    """The files below a folder, as an archive. Links lead out of it only with follow_links."""

    def __init__(self, path, follow_links):
        self.path, self.name, self.follow_links = path, path.name, follow_links
        self.entries = [Entry(os.path.relpath(os.path.join(folder, name), path))
                        for folder, _, names in os.walk(path) for name in names]
        self.entries.sort()

    def read(self, entry):
        path = records.path_inside(entry.filename, str(self.path), str(self.path),
                                   self.follow_links)
        return Path(path).read_bytes()
