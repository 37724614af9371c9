"""ILSVRC's meta.mat → the class of each number in its ground truth.

A MATLAB 5 file is a header of 128 bytes and *elements*: kind and length, 4 bytes each, then data
padded to 8 bytes (or, small, both in 4 bytes and data in the next 4). `synsets` in it is an array
of structs; this reads two fields of each, ILSVRC2012_ID (a number) and WNID (a text), and passes
over all others. Source: "MAT-File Format", MathWorks; tests compare with scipy's reader.
"""
import struct
import zlib
from pathlib import Path

NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
TEXTS = {2: "utf-8", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
COMPRESSED, MATRIX, STRUCT = 15, 14, 2


def elements(raw, order):
    """Yield (kind, data) of the elements in bytes; raises ValueError where they are cut short."""
    at = 0
    while at + 8 <= len(raw):
        kind, length = struct.unpack_from(f"{order}II", raw, at)
        start, step = at + 8, -(-length // 8) * 8
        if kind >> 16:                                        # small: the length is in the kind
            kind, length, start, step = kind & 0xFFFF, kind >> 16, at + 4, 0
        if kind == COMPRESSED:
            step = length                                     # the one kind that is not padded
        if start + length > len(raw):
            raise ValueError("it is cut short")
        data = raw[start:start + length]
        if kind == COMPRESSED:
            yield from elements(zlib.decompress(data), order)
        else:
            yield kind, data
        at += 8 + step


def value_of(matrix, order):
    """A matrix of one number or one text → it; None for what is neither."""
    parts = list(elements(matrix, order))
    if len(parts) != 4:                                       # flags, dimensions, name, data
        return None
    kind, data = parts[3]
    if parts[0][1][0 if order == "<" else 3] == 4:            # of characters
        encoding = {"utf-16": "utf-16-le" if order == "<" else "utf-16-be"}
        return data.decode(encoding.get(TEXTS[kind], TEXTS[kind]))
    return struct.unpack_from(order + NUMBERS[kind], data)[0] if data else None


def synsets(path):
    """{ILSVRC2012_ID: WNID} of a meta.mat; raises SystemExit."""
    raw = Path(path).read_bytes()
    order = {b"IM": "<", b"MI": ">"}.get(raw[126:128])
    try:
        if order is None:
            raise ValueError("no MATLAB 5 header")
        for kind, matrix in elements(raw[128:], order):
            parts = [data for _, data in elements(matrix, order)] if kind == MATRIX else []
            if len(parts) > 5 and parts[2] == b"synsets" and parts[0][
                    0 if order == "<" else 3] == STRUCT:
                return struct_of(parts, order)
        raise ValueError("no 'synsets' in it")
    except (ValueError, KeyError, IndexError, struct.error, zlib.error) as e:
        raise SystemExit(f"error: {path} is not ILSVRC2012's meta.mat ({e}); take it from "
                         f"ILSVRC2012_devkit_t12/data, or give Kaggle's LOC_val_solution.csv")


def struct_of(parts, order):
    """The elements of a struct array: flags, dimensions, name, length of a field's name, the names,
    then a matrix for each field of each struct."""
    width = struct.unpack(f"{order}i", parts[3][:4])[0]
    names = [parts[4][i:i + width].split(b"\0")[0] for i in range(0, len(parts[4]), width)]
    number, wnid = names.index(b"ILSVRC2012_ID"), names.index(b"WNID")
    values = parts[5:]
    return {int(value_of(values[i + number], order)): value_of(values[i + wnid], order)
            for i in range(0, len(values), len(names))}
