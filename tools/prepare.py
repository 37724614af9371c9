"""Published data, as they are downloaded → what the stages read. And: is all that I have readable?

    python -m tools.prepare onevision  SOURCE data              # → --data data
    python -m tools.prepare imagenet   SOURCE data/imagenet     # → probe_linear.py --data …
    python -m tools.prepare align      SOURCE data/align        # → probe_align.py --data …
    python -m tools.prepare mmpr       SOURCE data/preferences  # → --data data
    python -m tools.prepare pack       SOURCE data/images.pack  # → --images data/images.pack
    python -m tools.prepare ade20k     data/ade20k              # these three write nothing
    python -m tools.prepare benchmarks data/bench
    python -m tools.prepare check      data

Reads   SOURCE, the folder that was downloaded:
        onevision   lmms-lab/LLaVA-OneVision-Data: SUBSET/train-*.parquet (id, image, conversations,
                    data_source). What else lies there is named.
        imagenet    ILSVRC/imagenet-1k: {train,validation}-*.parquet (image, label); or ILSVRC2012's
                    own folders: train/CLASS/*.JPEG, val/*.JPEG, and for a flat val its truth:
                    Kaggle's LOC_val_solution.csv, or the devkit's meta.mat and
                    ILSVRC2012_validation_ground_truth.txt (in SOURCE, or --truth FILE)
        align       minhuh/prh, revision wit_1024: parquet (image, text); the first text is taken
        mmpr        OpenGVLab/MMPR-v1.2 (v1.1, v1): meta.json, annotations.zip, images.zip or its
                    parts. They are read as they lie there, not joined.
        pack        any folder of pictures, or a .zip (in parts)
Writes  onevision   data/instruct.jsonl, data/images/onevision/ (--pack: onevision.pack)
        imagenet    OUT/{train,val}/CLASS/…; --pack: OUT.pack. Own folders are linked, not copied.
        align       OUT/pairs.jsonl, OUT/images/
        mmpr        OUT/meta.json, OUT/MMPR-v1.2/{annotations,images}/ (--pack: images.pack)

Pictures keep their bytes, unless --max-side shrinks them. Every one is read back after it was
written. Killed at any moment, or out of disk, the same command goes on; until it has ended nothing
stands under its final name (it grows in OUT/../prepared/). It takes as much disk as its result.

`check` reads every record and decodes every picture of DATA in its default layout, and names all
bad ones, not the first alone. `benchmarks` compares MD5s with those that VLMEvalKit publishes.
"""
import errno
import json
import os
import re
from pathlib import Path

from pivot import distributed, files, flags, packs, records
from pivot.distributed import print0
from tools import archives, growing, parquet
from tools.checking import ade20k, benchmarks, check, check_sets
from tools.imagenet import imagenet

ENTRIES = 500               # of an archive, or files of a folder, a unit
CHAT = {"id": None, "image": "bytes", "conversations": "value"}
PAIR = {"image": "bytes", "text": None}


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    parser.usage = "python -m tools.prepare WHAT [SOURCE] OUT [flags]"
    add = parser.add_argument
    add("what", choices=list(COMMANDS), metavar="WHAT", help=", ".join(COMMANDS))
    add("paths", nargs="+", metavar="PATH", help="SOURCE and OUT; of ade20k, benchmarks and check "
        "the folder alone")
    add("--pack", action="store_true", help="pictures into a few large files (pivot/packs.py), not "
        "into a file each")
    add("--max-side", type=flags.COUNT, metavar="N", help="shrink pictures whose longer side has "
        "over N pixels (bicubic; a JPEG stays one, of quality 95)")
    add("--truth", metavar="FILE", help="imagenet: the classes of a flat val, where they are not "
        "in SOURCE")
    add("--images", metavar="DIR", help="check: the folder or pack that image names are relative "
        "to; default DATA/images or images.pack")
    flags.add_follow_links(parser)
    args = parser.parse_args(argv)
    wanted = 1 if args.what in READ_ONLY else 2
    if len(args.paths) != wanted:
        what = "one folder" if wanted == 1 else "two paths, SOURCE and OUT"
        raise SystemExit(f"error: {args.what} takes {what}, not {len(args.paths)}; --help shows it")
    if not Path(args.paths[0]).exists():
        raise SystemExit(f"error: {args.paths[0]} does not exist")
    args.source, args.out = Path(args.paths[0]), Path(args.paths[-1])
    return args


# ---------------------------------------------------------------------------------- from parquet

def onevision(args):
    """SUBSET/*.parquet → one jsonl in LLaVA's form, and pictures."""
    subsets = parquet.parts_in(args.source)
    units = [(f"{subset}/{i:05d}", path) for subset, paths in subsets.items()
             for i, path in enumerate(paths)]
    name = "onevision" + (packs.ENDING if args.pack else "")
    grown = begin(args, args.out, "onevision", units, CHAT, [
        (name, args.out / "images" / name), ("instruct.jsonl", args.out / "instruct.jsonl")])

    def record(row, picture):
        made = {"id": row["id"], "conversations": row["conversations"]}
        if picture:
            made["image"] = f"{name}/{picture}"
        if row.get("data_source"):
            made["data_source"] = row["data_source"]
        return made
    if not grown.finished:
        fill(args, grown, units, CHAT, name, "instruct.jsonl", record)
    there = {folder.name for folder in args.source.glob("[!.]*/")}
    if others := sorted(there - {subset.split("/")[0] for subset in subsets}):
        print0(f"  without parquet, and so left out: {', '.join(others)} (archives? Unpack them "
               f"into {args.out}/images, and add their records)")
    print0(f"{args.out}/instruct.jsonl: {grown.counts['records']:,} records of {len(subsets)} "
           f"subsets; {grown.pictures_said()} in {args.out}/images/{name}\n"
           f"Next:  python -m tools.prepare check {args.out}\n"
           f"then:  python pretrain.py --data {args.out}")


def align(args):
    """Pictures and texts → pairs.jsonl and images/, which probe_align.py reads."""
    paths = [path for found in parquet.parts_in(args.source).values() for path in found]
    units, name = [(f"{i:05d}", path) for i, path in enumerate(paths)], args.out.name
    grown = begin(args, args.out.parent, name, units, PAIR, [(name, args.out)])

    def record(row, picture):
        texts = row["text"]
        caption = texts[0] if isinstance(texts, list) and texts else texts
        return {"image": picture, "caption": caption}
    if not grown.finished:
        folder = f"{name}/images" + (packs.ENDING if args.pack else "")
        fill(args, grown, units, PAIR, folder, f"{name}/pairs.jsonl", record)
    print0(f"{args.out}/pairs.jsonl: {grown.counts['records']:,} pairs; {grown.pictures_said()}\n"
           f"Next:  python probe_align.py --encoder siglip2-so400m --llm qwen2.5-1.5b "
           f"--data {args.out}")


def begin(args, home, name, units, columns, moves):
    """Open every file once, which refuses what is not whole before hours of work. units: [(what the
    names of its pictures begin with, file), …]. → Growing."""
    sources = [[path.relative_to(args.source).as_posix(), path.stat().st_size,
                parquet.count(path, columns)] for _, path in units]
    return growing.Growing(home, name, growing.made_of(args, sources), moves)


def fill(args, grown, units, columns, folder, lines, record):
    """Rows → pictures in `folder` and a line each in `lines`, both in WORK. record: a row, and its
    picture's name or None → what the line says. Rows are kept as they are, bad ones too: `check`,
    or a stage, names these."""
    rows = [count for *_, count in grown.of["sources"]]
    pictures = growing.Pictures(grown, folder)
    with growing.bar(sum(rows), args.what, sum(rows[:grown.done])) as shown:
        for start, path in grown.units(units):
            for number, row in enumerate(parquet.rows(path, columns, ["data_source"])):
                raw, picture = parquet.picture(row, f"{path}:row {number}"), None
                if raw is not None:
                    raw = growing.shrunk(raw, args.max_side)
                    picture = f"{start}-{number:06d}.{growing.ending_of(raw)}"
                    pictures.add(picture, raw)
                line = json.dumps(record(row, picture), ensure_ascii=False)
                grown.file(lines).write(line.encode() + b"\n")
                grown.count("records")
                shown.update()
            pictures.commit()
    pictures.close()
    grown.finish()


# --------------------------------------------------------------------------------- from archives

def mmpr(args):
    """meta.json and archives → the folder that --preferences reads; then every set is checked."""
    meta = files.read_json(args.source / "meta.json")
    try:
        tops = {path.split("/")[0] for s in meta.values() for path in (s["root"], s["annotation"])}
    except (AttributeError, KeyError, TypeError):
        raise SystemExit(f"error: {args.source}/meta.json: each set needs 'root' and 'annotation'")
    if len(tops) != 1:
        raise SystemExit(f"error: {args.source}/meta.json: its paths begin with "
                         f"{', '.join(sorted(tops))}; one folder, as MMPR-v1.2/, is expected")
    top, name = tops.pop(), args.out.name
    found = [archives.Archive(args.source / x) for x in ("annotations.zip", "images.zip")]
    made_of = growing.made_of(args, [[archive.name, len(archive.entries)] for archive in found])
    grown = growing.Growing(args.out.parent, name, made_of, [(name, args.out)])
    if not grown.finished:
        folder = f"{name}/{top}"
        pictures = growing.Pictures(
            grown, f"{folder}/images{packs.ENDING}" if args.pack else f"{folder}/images")
        through(found, grown, pictures, lambda archive, entry: unpack(
            args, archive, entry, pictures, grown.work / folder, top))
        if args.pack:
            for s in meta.values():
                s["root"] = re.sub("/images(?=/|$)", f"/images{packs.ENDING}", s["root"], count=1)
        files.write_json(grown.work / name / "meta.json", meta)
        files.sync(grown.work / name / "meta.json")
        grown.finish()
    print0(f"{args.out}/meta.json: {len(meta)} sets; {grown.pictures_said()}")
    check_sets(args.out / "meta.json", files.read_json(args.out / "meta.json"), args)
    print0(f"Next:  python train_dpo.py --data {args.out.parent}")


def through(found, grown, pictures, take, wanted=lambda entry: True):
    """take(archive, entry) for every wanted entry of these archives, ENTRIES a unit."""
    entries = [(archive, entry) for archive in found for entry in archive.entries if wanted(entry)]
    units = [entries[i:i + ENTRIES] for i in range(0, len(entries), ENTRIES)]
    with growing.bar(len(entries), "files", grown.done * ENTRIES, "") as shown:
        for unit in grown.units(units):
            for archive, entry in unit:
                take(archive, entry)
                shown.update()
            pictures.commit()
    pictures.close()


def unpack(args, archive, entry, pictures, folder, top):
    """One entry of MMPR's archives: a picture, or an annotation, which goes to `folder`."""
    name = entry.filename.removeprefix(f"{top}/")
    if name.lower().endswith(records.PICTURES) and name.startswith("images/"):
        raw = growing.shrunk(archive.read(entry), args.max_side)
        pictures.add(name.removeprefix("images/"), raw)
        return
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        for piece in archive.pieces(entry):
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    files.sync(path.parent)


def pack(args):
    """A folder, or a zip → a pack of all its pictures, under the names they have there."""
    if not args.out.name.endswith(packs.ENDING):
        raise SystemExit(f"error: {args.out}: the name of a pack ends in {packs.ENDING}")
    start, zipped, _ = args.source.name.rpartition(".zip")
    source = archives.Archive(args.source.with_name(f"{start}.zip")) if zipped else \
        archives.Folder(args.source, args.follow_links)
    chosen = sum(map(is_picture, source.entries))
    if not chosen:
        raise SystemExit(f"error: no picture in {args.source}")
    if chosen < len(source.entries):
        print0(f"  {len(source.entries) - chosen} files are no pictures by their names, and are "
               f"left out")
    name = args.out.name
    grown = growing.Growing(args.out.parent, name, growing.made_of(args, [[source.name, chosen]]),
                            [(name, args.out)])
    if not grown.finished:
        pictures = growing.Pictures(grown, name)
        through([source], grown, pictures, lambda source, entry: pictures.add(
            entry.filename, growing.shrunk(source.read(entry), args.max_side)), is_picture)
        grown.finish()
    print0(f"{args.out}: {grown.pictures_said()}\n"
           f"Next:  python pretrain.py --data {args.out.parent} --images {args.out}")


def is_picture(entry):
    name = entry.filename.lower()
    return name.endswith(records.PICTURES) and not name.rpartition("/")[2].startswith(".")


READ_ONLY = {"ade20k", "benchmarks", "check"}
COMMANDS = {"onevision": onevision, "imagenet": imagenet, "align": align, "mmpr": mmpr,
            "pack": pack, "ade20k": ade20k, "benchmarks": benchmarks, "check": check}


def main():
    args = get_args()
    try:
        COMMANDS[args.what](args)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        raise SystemExit(f"error: no room left on the disk ({e.filename or args.out}); make some, "
                         f"then the same command goes on")


if __name__ == "__main__":
    distributed.launch(main)
