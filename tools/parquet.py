"""Parquet files as the hub publishes data sets; pyarrow is imported here alone."""
import re
from pathlib import Path

BATCH = 32                                             # rows in memory at once
NUMBERED = re.compile(r"(.*?)(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet")  # train-00000-of-00012
COUNTED = re.compile(r"\d{4,}\.parquet")                                # 0000, 0001, …


def library():
    """pyarrow and pyarrow.parquet; raises SystemExit where they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SystemExit("error: parquet files need pyarrow:  pip install -r "
                         "requirements-prepare.txt")
    return pyarrow, pyarrow.parquet


def parts_in(source):
    """The .parquet files below a folder, {folder relative to it: [path, …] in order}; raises
    SystemExit where there is none, or where one is missing among its numbered like."""
    source, found = Path(source), {}
    for path in sorted(source.rglob("*.parquet")):
        found.setdefault(path.parent.relative_to(source).as_posix(), []).append(path)
    if not found:
        raise SystemExit(f"error: no .parquet file in {source}")
    for folder, paths in found.items():
        refuse_gaps(source / folder, [path.name for path in paths])
    return found


def refuse_gaps(folder, names):
    """Raise SystemExit where train-00003-of-00012.parquet, or 0003.parquet, is missing."""
    there, expected = set(names), set()
    if counted := [name for name in names if COUNTED.fullmatch(name)]:
        last = max(int(name.split(".")[0]) for name in counted)
        expected |= {f"{i:04d}.parquet" for i in range(last + 1)}
    for start, number, total in (m.groups() for m in map(NUMBERED.fullmatch, names) if m):
        there.add(f"{start}{number}-of-{total}.parquet")         # without its digest
        expected |= {f"{start}{i:05d}-of-{total}.parquet" for i in range(int(total))}
    if missing := sorted(expected - there):
        raise SystemExit(f"error: {folder}/{missing[0]} is missing ({len(missing)} of "
                         f"{len(expected)} parts are); download it, then the same command goes on")


def not_whole(path, error):
    said = str(error).strip().splitlines()[0][:120]
    return SystemExit(f"error: {path} is not a whole parquet file ({said}); download it again, "
                      f"then the same command goes on")


def opened(path, columns):
    """A parquet file, its columns checked. columns: {name: what must be inside it, or None}."""
    pyarrow, parquet = library()
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError) as e:
        raise not_whole(path, e)
    for name, inside in columns.items():
        known = name in schema.names
        if not known or (inside and inside not in str(schema.field(name).type)):
            raise SystemExit(f"error: {path}: no column '{name}'"
                             + (f" with '{inside}' in it" if inside else "")
                             + f"; its columns are {', '.join(schema.names)[:200]}")
    return file


def count(path, columns):
    """How many rows; this opens the file, and so refuses one that was cut short."""
    with opened(path, columns) as file:
        return file.metadata.num_rows


def rows(path, columns, others=()):
    """Yield {column: value}, row by row, of these columns and of those of `others` that are there.
    raises SystemExit."""
    pyarrow, _ = library()
    with opened(path, columns) as file:
        wanted = [*columns, *(name for name in others if name in file.schema_arrow.names)]
        batches = file.iter_batches(BATCH, columns=wanted)
        while True:
            try:
                batch = next(batches, None)
                found = batch.to_pylist() if batch is not None else None
            except (pyarrow.ArrowException, OSError) as e:
                raise not_whole(path, e)
            if found is None:
                return
            yield from found


def picture(row, where):
    """The picture under `image` of a row: its bytes, or None; raises SystemExit where only its name
    is there."""
    image = row["image"]
    if image is None:
        return None
    if image["bytes"] is None:
        raise SystemExit(f"error: {where}: the picture {image.get('path')} is named, but not in "
                         f"the file; a parquet with pictures inside is needed")
    return image["bytes"]
