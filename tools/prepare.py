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
import csv
import errno
import hashlib
import itertools
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import probe_linear
import probe_seg
from judge import answer, score
from pivot import distributed, files, flags, images, packs, printing, records
from pivot.distributed import print0
from pivot.records import BadRecord
from tools import archives, growing, matlab, parquet

ENTRIES = 500               # of an archive, or files of a folder, a unit
WNID = re.compile(r"(?<![a-zA-Z0-9])n\d{8}(?![0-9])")
# VLMEvalKit's vlmeval/dataset/, August 2026: MD5 by name. The files lie below URL, MMBench's,
# SEEDBench's and ScienceQA's below BENCHMARKS.
URL = "https://opencompass.openxlab.space/utils/VLMEval/"
BENCHMARKS = "https://opencompass.openxlab.space/utils/benchmarks/"
MD5 = {
    "MME": "b36b43c3f09801f5d368627fb92187c3",
    "MMBench_DEV_EN": "b6caf1133a01c6bb705cf753bb527ed8",
    "SEEDBench_IMG": "68017231464752261a2526d6ca3a10c0",
    "GQA_TestDev_Balanced": "99b62f22e224d9b2f32dcbe41359d1c9",
    "ScienceQA_TEST": "e42e9e00f9c59a80d8a5db35bc32b71f",
    "MMMU_DEV_VAL": "585e8ad75e73f75dcad265dfd0417d64",
    "MathVista_MINI": "f199b98e178e5a2a20e7048f5dcb0464",
    "AI2D_TEST": "0f593e0d1c7df9a3d69bf1f947e71975",
    "ChartQA_TEST": "c902e0aa9be5582a7aad6dcf52734b42",
    "OCRBench": "e953d98a987cc6e26ef717b61260b778",
    "TextVQA_VAL": "b233b31f551bbf4056f2f955da3a92cd",
    "DocVQA_VAL": "d5ee77e1926ff10690d469c56b73eabf",
    "MMVP": "8cb732b141a0cba5b42159df2839e557",
    "RealWorldQA": "4de008f55dc4fd008ca9e15321dc44b7",
    "CV-Bench-2D": "a7cff4cc2857cc237ee2b89e62bccb2d",
    "CV-Bench-3D": "bb94c0d568d652d15b60e001ac40a170"}
BELOW = {"MMBench_DEV_EN": "MMBench/", "SEEDBench_IMG": "SEEDBench/",
         "ScienceQA_TEST": "ScienceQA/"}


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


def bar(total, what, done=0, unit=" rows"):
    return tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10)


def size_of(number):
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


# ------------------------------------------------------------------------- what all writers share

class Work:
    """One command's result, as it grows. name: of the result below its folder `home`; sources: what
    it is made from, [[name, size], …], by which it is known again; moves: as growing.Growing takes
    them."""

    def __init__(self, args, home, name, sources, moves):
        self.of = {"what": args.what, "pack": args.pack, "max_side": args.max_side,
                   "files": sources}
        self.said = Path(home, "prepared", f"{name}.json")
        self.counts = growing.already_there(self.said, self.of)
        if self.counts is None:
            self.grown = growing.Growing(self.said.with_suffix(""), self.of, moves)

    def units(self, units):
        """Those of the units that are still to do."""
        if self.grown.done:
            print0(f"  goes on after {self.grown.done} of {len(units)} parts")
        return units[self.grown.done:]

    def finish(self):
        self.grown.finish(self.said)
        self.counts = self.grown.counts


def sizes(paths, root):
    """[[name below root, bytes], …] of files."""
    return [[os.path.relpath(path, root), path.stat().st_size] for path in paths]


def inside(row, where):
    """The picture of a parquet row: its bytes, or None; raises SystemExit where only its name is
    there."""
    image = row["image"]
    if image is None:
        return None
    if image["bytes"] is None:
        raise SystemExit(f"error: {where}: the picture {image.get('path')} is named, but not in "
                         f"the file; a parquet with pictures inside is needed")
    return image["bytes"]


# ------------------------------------------------------------------------------------- onevision

CHAT = {"id": None, "image": "bytes", "conversations": "value"}


def onevision(args):
    """SUBSET/*.parquet → one jsonl in LLaVA's form, and pictures."""
    subsets = parquet.parts_in(args.source)
    units = [(subset, i, path) for subset, paths in subsets.items()
             for i, path in enumerate(paths)]
    rows = [parquet.count(path, CHAT) for *_, path in units]
    name = "onevision" + (packs.ENDING if args.pack else "")
    work = Work(args, args.out, "onevision", sizes([p for *_, p in units], args.source), [
        (name, args.out / "images" / name), ("instruct.jsonl", args.out / "instruct.jsonl")])
    if work.counts is None:
        grown, pictures = work.grown, growing.Pictures(work.grown, name)
        with bar(sum(rows), "onevision", sum(rows[:grown.done])) as shown:
            for subset, i, path in work.units(units):
                for number, row in enumerate(parquet.rows(path, CHAT, ["data_source"])):
                    record = chat(row, f"{path}:row {number}", args, pictures,
                                  f"{subset}/{i:05d}-{number:06d}")
                    line = json.dumps(record, ensure_ascii=False)
                    grown.file("instruct.jsonl").write(line.encode() + b"\n")
                    grown.count("records")
                    shown.update()
                pictures.commit()
        pictures.close()
        work.finish()
    held = {folder.relative_to(args.source).as_posix() for folder in args.source.glob("*/")}
    if others := sorted(held - {subset.split("/")[0] for subset in subsets}):
        print0(f"  without parquet, and so left out: {', '.join(others)} (archives? Unpack them "
               f"into data/images yourself, and add their records)")
    print0(f"{args.out}/instruct.jsonl: {work.counts['records']:,} records of {len(subsets)} "
           f"subsets; {pictures_said(work)} in {args.out}/images/{name}")
    say_next(f"check {args.out}", f"pretrain.py --data {args.out}")


def chat(row, where, args, pictures, name):
    """A parquet row → LLaVA's record; its picture goes to `pictures`."""
    record, raw = {"id": row["id"]}, inside(row, where)
    if raw is not None:
        raw = growing.shrunk(raw, args.max_side)
        name += f".{growing.ending_of(raw)}"
        pictures.add(name, raw)
        record["image"] = f"{pictures.name}/{name}"
    record["conversations"] = row["conversations"]
    if row.get("data_source"):
        record["data_source"] = row["data_source"]
    return record


def pictures_said(work):
    count = work.counts
    said = f"{count.get('pictures', 0):,} pictures, "
    return said + (size_of(count["bytes"]) if "bytes" in count else "links, which take no room")


def say_next(check, command):
    if check:
        print0(f"Next:  python -m tools.prepare {check}")
    print0(f"{'then' if check else 'Next'}:  python {command}")


# -------------------------------------------------------------------------------------- imagenet

LABELLED = {"image": "bytes", "label": None}
SPLITS = {"train": "train", "validation": "val", "val": "val"}


def imagenet(args):
    """Parquet, or ILSVRC2012's own folders → {train,val}/CLASS/PICTURE, which probe_linear.py
    reads."""
    in_parquet = any(itertools.islice(args.source.rglob("*.parquet"), 1)) \
        if not folder_of(args.source, "train") else False
    name = args.out.name.removesuffix(packs.ENDING)
    place = args.out.with_name(name + packs.ENDING) if args.pack else args.out
    units, sources, read = imagenet_parquet(args) if in_parquet else imagenet_folders(args)
    work = Work(args, args.out.parent, place.name, sources, [(place.name, place)])
    if work.counts is None:
        grown, pictures = work.grown, growing.Pictures(work.grown, place.name)
        with bar(len(units), "imagenet", grown.done, " parts") as shown:
            for unit in work.units(units):
                read(unit, pictures)
                pictures.commit()
                shown.update()
        train, val = (set(grown.counts.get(split, {})) for split in ("train", "val"))
        if alone := sorted(train ^ val):
            raise SystemExit(f"error: class {alone[0]} is not in both train and val ({len(alone)} "
                             f"such); is a part missing? Nothing stands in {place}")
        pictures.close()
        work.finish()
    print0(f"{place}: {len(work.counts['train']):,} classes, {pictures_said(work)}")
    say_next("", f"probe_linear.py --encoder siglip2-so400m --data {place}")


def count_class(grown, split, name):
    classes = grown.counts.setdefault(split, {})
    classes[name] = classes.get(name, 0) + 1


def imagenet_parquet(args):
    """→ units, sources, and what reads a unit. The class of a row is the WordNet id in its
    picture's name, else the label's number."""
    paths = [p for found in parquet.parts_in(args.source).values() for p in found]
    units = [(SPLITS[part], i, path) for i, path in enumerate(paths)
             if (part := path.name.split("-")[0]) in SPLITS or
             (part := path.parent.name) in SPLITS]
    if {split for split, *_ in units} != {"train", "val"}:
        raise SystemExit(f"error: {args.source} needs train-*.parquet and validation-*.parquet")
    for *_, path in units:
        parquet.count(path, LABELLED)

    def read(unit, pictures):
        split, i, path = unit
        classes = pictures.growing.counts.setdefault("labels", {})
        for number, row in enumerate(parquet.rows(path, LABELLED)):
            where = f"{path}:row {number}"
            raw, label = inside(row, where), row["label"]
            if raw is None or label is None or label < 0:
                raise SystemExit(f"error: {where}: no {'picture' if raw is None else 'label'}")
            file = os.path.basename(row["image"].get("path") or "")
            found = WNID.search(file.replace("_", " "))
            name = found.group() if found else f"{label:04d}"
            if classes.setdefault(str(label), name) != name:
                raise SystemExit(f"error: {where}: label {label} is {name} here and "
                                 f"{classes[str(label)]} before")
            raw = growing.shrunk(raw, args.max_side)
            count_class(pictures.growing, split, name)
            pictures.add(f"{split}/{name}/{i:05d}-{number:06d}.{growing.ending_of(raw)}", raw)
    return units, sizes([p for *_, p in units], args.source), read


def folder_of(source, split):
    """Where ILSVRC2012's own folders have a split, or None."""
    return next((folder for above in ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
                 for name in (split, f"ILSVRC2012_img_{split}")
                 if (folder := source / above / name).is_dir() and
                 any(entry.is_dir() or entry.name.endswith(".JPEG") for entry in
                     itertools.islice(os.scandir(folder), 10))), None)


def imagenet_folders(args):
    """The same of train/CLASS/*.JPEG and val/*.JPEG or val/CLASS/*.JPEG. No picture is copied
    where it can be linked."""
    units = []
    for split in ("train", "val"):
        folder = folder_of(args.source, split)
        if folder is None:
            raise SystemExit(f"error: no {split}/ with pictures in {args.source}, and no parquet; "
                             f"unpack ILSVRC2012_img_{split}.tar there")
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if classes:
            units += [(split, name, folder / name) for name in classes]
        else:
            units += [(split, None, folder)]
    flat = next((folder for split, name, folder in units if split == "val" and name is None), None)
    truth = classes_of(args, flat) if flat else {}

    def read(unit, pictures):
        split, name, folder = unit
        for path in images.pictures_in([folder])[folder]:
            stem = Path(path).stem
            if name is None and stem not in truth:
                raise SystemExit(f"error: {path}: the ground truth does not name it")
            kind = name or truth[stem]
            to = f"{split}/{kind}/{Path(path).name}"
            count_class(pictures.growing, split, kind)
            if args.max_side:
                pictures.add(to, growing.shrunk(Path(path).read_bytes(), args.max_side))
            else:
                pictures.link(to, path)
    return units, [[split, name] for split, name, _ in units], read


def classes_of(args, val):
    """{stem of a validation picture: its class}, from either published form of the truth."""
    names = ("LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt")
    places = [args.source / above / name for name in names for above in
              ("", "data", "devkit/data", "ILSVRC2012_devkit_t12/data")]
    path = Path(args.truth) if args.truth else next((p for p in places if p.is_file()), None)
    if path is None or not path.is_file():
        raise SystemExit(f"error: {val} has no class folders, and the truth is not at "
                         f"{path or args.source}: name {' or '.join(names)} by --truth")
    if path.suffix == ".csv":                     # ILSVRC2012_val_00048981,n03995372 85 1 499 272
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"ImageId", "PredictionString"} <= rows[0].keys():
            raise SystemExit(f"error: {path}: no columns ImageId and PredictionString")
        found = {row["ImageId"]: (row["PredictionString"] or "").split() for row in rows}
        bad = next((k for k, v in found.items() if not v or not WNID.fullmatch(v[0])), None)
        if bad is not None:
            raise SystemExit(f"error: {path}: {bad} has no class")
        return {image: words[0] for image, words in found.items()}
    if not path.with_name("meta.mat").exists():
        raise SystemExit(f"error: {path} holds numbers; which class each is stands in meta.mat, "
                         f"which is not beside it")
    wnids, found = matlab.synsets(path.with_name("meta.mat")), {}
    for number, line in enumerate(path.read_text(encoding="ascii", errors="replace").split(), 1):
        if not line.isdecimal() or int(line) not in wnids:
            raise SystemExit(f"error: {path}:{number}: {line[:20]!r} is no number of meta.mat")
        found[f"ILSVRC2012_val_{number:08d}"] = wnids[int(line)]
    return found


# ----------------------------------------------------------------------------------------- align

def align(args):
    """Pictures and texts in parquet → pairs.jsonl and images/, which probe_align.py reads."""
    paths = [p for found in parquet.parts_in(args.source).values() for p in found]
    columns, name = {"image": "bytes", "text": None}, args.out.name
    total = sum(parquet.count(path, columns) for path in paths)
    work = Work(args, args.out.parent, name, sizes(paths, args.source), [(name, args.out)])
    if work.counts is None:
        grown = work.grown
        pictures = growing.Pictures(grown, f"{name}/images" + (packs.ENDING if args.pack else ""))
        with bar(total, "align", grown.counts.get("records", 0)) as shown:
            for i, path in enumerate(work.units(paths), grown.done):
                for number, row in enumerate(parquet.rows(path, columns)):
                    where = f"{path}:row {number}"
                    raw, texts = inside(row, where), row["text"]
                    caption = texts[0] if isinstance(texts, list) and texts else texts
                    if raw is None or not isinstance(caption, str) or not caption.strip():
                        raise SystemExit(f"error: {where}: a picture and a text are needed")
                    raw = growing.shrunk(raw, args.max_side)
                    file = f"{i:05d}-{number:06d}.{growing.ending_of(raw)}"
                    pictures.add(file, raw)
                    line = json.dumps({"image": file, "caption": caption}, ensure_ascii=False)
                    grown.file(f"{name}/pairs.jsonl").write(line.encode() + b"\n")
                    grown.count("records")
                    shown.update()
                pictures.commit()
        pictures.close()
        work.finish()
    print0(f"{args.out}/pairs.jsonl: {work.counts['records']:,} pairs; {pictures_said(work)}")
    say_next("", f"probe_align.py --encoder siglip2-so400m --llm qwen2.5-1.5b --data {args.out}")


# ------------------------------------------------------------------------------------------ mmpr

def mmpr(args):
    """meta.json and archives → the folder that --preferences reads; then every set is checked."""
    meta = files.read_json(args.source / "meta.json")
    try:
        tops = {path.split("/")[0] for s in meta.values() for path in (s["root"], s["annotation"])}
    except (AttributeError, KeyError, TypeError):
        raise SystemExit(f"error: {args.source}/meta.json: each set needs 'root' and 'annotation'")
    top = tops.pop() if len(tops) == 1 else ""          # "MMPR-v1.2"
    found = [archives.Archive(args.source / name) for name in ("annotations.zip", "images.zip")]
    units = [(archive, archive.entries[i:i + ENTRIES]) for archive in found
             for i in range(0, len(archive.entries), ENTRIES)]
    name = args.out.name
    sources = [[archive.name, len(archive.entries)] for archive in found]
    work = Work(args, args.out.parent, name, sources, [(name, args.out)])
    if work.counts is None:
        grown, packed = work.grown, f"{name}/{top}/images" + packs.ENDING
        pictures = growing.Pictures(grown, packed if args.pack else f"{name}/{top}")
        total = sum(len(archive.entries) for archive in found)
        with bar(total, "mmpr", min(grown.done * ENTRIES, total), " files") as shown:
            for archive, some in work.units(units):
                for entry in some:
                    file = entry.filename.removeprefix(f"{top}/")
                    unpack(archive, entry, file, args, pictures, f"{name}/{top}")
                    shown.update()
                pictures.commit()
        pictures.close()
        if args.pack:
            for s in meta.values():
                s["root"] = re.sub(r"(^|/)images(/|$)", r"\1images.pack\2", s["root"], count=1)
        files.write_json(grown.work / name / "meta.json", meta)
        files.sync(grown.work / name / "meta.json")
        work.finish()
    print0(f"{args.out}/meta.json: {len(meta)} sets; {pictures_said(work)}")
    check_sets(args.out / "meta.json", meta, args)
    say_next("", f"train_dpo.py --data {args.out.parent}")


def unpack(archive, entry, file, args, pictures, folder):
    """One entry of an archive: a picture, or an annotation, which goes beside them as it is."""
    if file.lower().endswith(records.PICTURES):
        raw = growing.shrunk(archive.read(entry), args.max_side)
        pictures.add(file.removeprefix("images/") if pictures.packed else file, raw)
        return
    path = pictures.growing.work / folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        for piece in archive.pieces(entry):
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())


def check_sets(path, meta, args):
    """Every pair of every set is read, and its picture looked for; a line a set with something to
    say."""
    bad = 0
    for (name, facts), (file, root) in zip(meta.items(), records.pair_sources(path)):
        count, faults = 0, []
        for where, item in records.read_lines(file):
            count += 1
            if fault := fault_of(where, item, root, records.pair_record, args.follow_links, False):
                faults.append(fault)
        bad += len(faults)
        if faults:
            print0(f"  {name}: {len(faults)} of {count:,} pairs are bad, the first: {faults[0]}")
        if facts.get("length", count) != count:
            print0(f"  {name}: {count:,} pairs, and meta.json says {facts['length']:,}")
    remedy = ": train with --skip-bad, SFT and DPO both" if bad else ""
    print0(f"  {bad or 'no'} bad pairs{remedy}")


# ------------------------------------------------------------------------------------------ pack

def pack(args):
    """A folder, or a zip → a pack of all its pictures, under the names they have there."""
    if not args.out.name.endswith(packs.ENDING):
        raise SystemExit(f"error: {args.out}: the name of a pack ends in {packs.ENDING}")
    if args.source.suffix == ".zip" or re.search(r"\.zip_[a-z]+$", args.source.name):
        whole = args.source.name.rpartition(".zip")[0] + ".zip"
        archive = archives.Archive(args.source.with_name(whole))
        names = [(e.filename, e) for e in archive.entries
                 if e.filename.lower().endswith(records.PICTURES)]
        sources, read = [[archive.name, len(names)]], archive.read
    else:
        names = [(os.path.relpath(os.path.join(folder, name), args.source),) * 2
                 for folder, _, found in sorted(os.walk(args.source)) for name in sorted(found)
                 if name.lower().endswith(records.PICTURES) and not name.startswith(".")]
        sources = [["pictures", len(names)]]

        def read(name):
            path = records.path_inside(name, args.source, f"{args.source}", args.follow_links)
            return Path(path).read_bytes()
    if not names:
        raise SystemExit(f"error: no picture in {args.source}")
    name = args.out.name
    work = Work(args, args.out.parent, name, sources, [(name, args.out)])
    if work.counts is None:
        pictures = growing.Pictures(work.grown, name)
        units = [names[i:i + ENTRIES] for i in range(0, len(names), ENTRIES)]
        with bar(len(names), "pack", work.grown.done * ENTRIES, " pictures") as shown:
            for unit in work.units(units):
                for inside_name, entry in unit:
                    pictures.add(inside_name, growing.shrunk(read(entry), args.max_side))
                    shown.update()
                pictures.commit()
        pictures.close()
        work.finish()
    print0(f"{args.out}: {pictures_said(work)}")
    say_next("", f"pretrain.py --data {args.out.parent} --images {args.out}")


# ----------------------------------------------------------------------------- reading, all of it

def fault_of(where, item, root, make, follow_links, decode=True):
    """Why a record is bad, or None. make: as records.pair_record. One of several pictures is no
    bad one: stages count it and leave it out."""
    try:
        item = records.parse(where, item)
        image = records.image_of(item, root, where, follow_links)
        if image == "many":
            return None
        make(where, item, image)
        if decode and image:
            images.load_image(image, None, where)
    except BadRecord as e:
        return str(e)
    return None


def pair_of_probe(where, item, image):
    if image is None:
        raise BadRecord(f"{where}: a pair needs one image")
    records.text_of(item, "caption", where)


def faults_of(what, jobs, job):
    """job(*one of the jobs) → a fault or None, on all cores: prints every fault. → how many were
    looked at, and how many are bad. What stops the reading itself is a fault, too."""
    count, bad, jobs = 0, 0, iter(jobs)
    with ThreadPoolExecutor(distributed.cores()) as pool, bar(None, what, unit="") as shown:
        try:
            while some := list(itertools.islice(jobs, 256)):
                for fault in pool.map(lambda one: job(*one), some):
                    if fault:
                        print0(f"bad: {fault}")
                        bad += 1
                count += len(some)
                shown.update(len(some))
        except (SystemExit, BadRecord, packs.Damaged) as e:
            print0(f"bad: {str(e).removeprefix('error: ')}")
            bad += 1
    if count or bad:
        print0(f"{what}: {count:,} read, {bad:,} bad")
    return count, bad


def check(args):
    """Everything in DATA's default layout."""
    data, total, bad = args.source, 0, 0
    root = args.images or packs.default_images(data)

    def look(what, jobs, job):
        nonlocal total, bad
        count, faults = faults_of(what, jobs, job)
        total, bad = total + count, bad + faults

    kinds = [("captions", records.caption_record), ("instruct", records.conversation_record),
             ("repair", records.conversation_record)]
    listed = [(records.default_file(data, name), root, make) for name, make in kinds]
    meta, heldout = data / "preferences/meta.json", data / "preferences/heldout.jsonl"
    if meta.exists():
        listed += [(file, folder, records.pair_record)
                   for file, folder in records.pair_sources(meta)]
    listed += [(heldout, packs.default_images(heldout.parent), records.pair_record),
               (data / "align/pairs.jsonl", packs.default_images(data / "align"), pair_of_probe)]
    for file, folder, make in listed:
        if Path(file).exists():
            look(str(file), records.read_lines(file), lambda where, item: fault_of(
                where, item, folder, make, args.follow_links))
    for tsv in sorted(data.glob("bench/*.tsv")):
        look(str(tsv), bench_jobs(tsv, args.follow_links), picture_fault)
    for folder in (data / "imagenet", data / f"imagenet{packs.ENDING}"):
        if folder.exists():
            look(str(folder), class_jobs(folder), picture_fault)
    if (data / "ade20k").exists():
        look(f"{data}/ade20k", mask_jobs(data / "ade20k"), mask_fault)
    for folder in [Path(root), *sorted(Path(root).glob(f"*{packs.ENDING}"))]:
        if packs.is_pack(folder):
            found = packs.opened(str(folder))
            look(f"{folder}, CRCs", ((found, row) for row in found.index), crc_fault)
    if not total + bad:
        raise SystemExit(f"error: nothing to check in {data}: no captions, instruct.jsonl, "
                         f"preferences/meta.json, bench/, align/, imagenet/ or ade20k/")
    if bad:
        raise SystemExit(f"error: {bad:,} bad of {total:,} in {data}, named above (a stage drops "
                         f"bad records with --skip-bad)")
    print0(f"{data}: {total:,} read, none bad")


def crc_fault(pack, row):
    whole = pack.whole(row)
    return None if whole else f"{pack.folder}: {row['name'].decode()}: its bytes have changed"


def picture_fault(picture, where):
    """picture: as images.load_image takes it, or what gives it."""
    try:
        images.load_image(picture() if callable(picture) else picture, None, where)
    except BadRecord as e:
        return str(e)


def bench_jobs(tsv, follow_links):
    rows, _ = answer.read_tsv(tsv, follow_links)
    for row in rows:
        yield (lambda row=row: answer.picture_of(tsv, row)), row["where"]


def class_jobs(folder):
    for classes in probe_linear.class_folders(folder):
        for paths in classes.values():
            yield from ((str(path), "imagenet") for path in paths)


def mask_jobs(folder):
    for split in probe_seg.list_splits(folder, None):
        yield from split


def mask_fault(image, mask):
    try:
        probe_seg.square(image, mask, 32, 151)
    except BadRecord as e:
        return str(e)


def ade20k(args):
    """ADEChallengeData2016, as it is unpacked: is every picture readable, and its mask, too?"""
    published = {"training": 20210, "validation": 2000}
    for split, pairs in zip(published, probe_seg.list_splits(args.source, None)):
        if len(pairs) != published[split]:
            print0(f"  {split}: {len(pairs):,} pictures; published are {published[split]:,}")
    count, bad = faults_of("ade20k", mask_jobs(args.source), mask_fault)
    if bad:
        raise SystemExit(f"error: {bad} of {count} pictures or masks are bad, named above")
    say_next("", f"probe_seg.py --encoder siglip2-so400m --data {args.source}")


def benchmarks(args):
    """The sixteen TSVs: which are there, whole (MD5) and readable (every row and picture)?"""
    rows, wrong = [["benchmark", "bytes", "MD5", "questions"]], []
    for name, md5 in MD5.items():
        path = args.source / f"{name}.tsv"
        if not path.exists():
            where = f"{BENCHMARKS}{BELOW[name]}{name}.tsv" if name in BELOW else f"{URL}{name}.tsv"
            rows.append([name, "missing", md5, where])
            continue
        with open(path, "rb") as file, tqdm.wrapattr(file, "read", path.stat().st_size, desc=name,
                                                     leave=False) as read:
            found = hashlib.md5()
            while piece := read.read(2 ** 22):
                found.update(piece)
        same = found.hexdigest() == md5
        try:
            questions = str(len(answer.read_tsv(path, args.follow_links)[0]))
        except (SystemExit, BadRecord) as e:
            questions = "unreadable"
            wrong.append(str(e).removeprefix("error: "))
        if not same:
            wrong.append(f"{path}: its MD5 is {found.hexdigest()}, published is {md5}; an older "
                         f"copy, or cut short? Download it again")
        rows.append([name, f"{path.stat().st_size:,}", "as published" if same else "WRONG",
                     questions])
    print0("\n".join(printing.table(rows)))
    for line in wrong[1:]:
        print0(f"  {line}")
    if wrong:
        raise SystemExit(f"error: {wrong[0]}"
                         + (f" (and {len(wrong) - 1} more, above)" if wrong[1:] else ""))
    if unknown := sorted(score.BENCHES.keys() - MD5.keys()):
        print0(f"  (of {', '.join(unknown)} no MD5 is published)")
    say_next("", f"repair_eval.py --mllm runs/NAME/dpo/final --bench {args.source}")


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
