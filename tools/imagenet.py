"""ImageNet, as it is published → {train,val}/CLASS/PICTURE, which probe_linear.py reads.

From imagenet-1k's parquet and from ILSVRC2012's own folders come the same names in the same
classes, so that a seed draws the same pictures of both.
"""
import csv
import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

from pivot import images, packs
from pivot.distributed import print0
from tools import growing, matlab, parquet

WNID = re.compile(r"n\d{8}")
FILE = re.compile(r"([\w-]+?)_(n\d{8})(\.\w+)")     # n01440764_10026_n01440764.JPEG, in the parquet
COLUMNS = {"image": "bytes", "label": None}
SPLITS = {"train": "train", "validation": "val", "val": "val"}


class Unit(NamedTuple):
    """Pictures of one split: a parquet file, its number; or a folder, of a class or (None) of all.
    """
    split: str
    path: Path
    kind: str | int | None


def imagenet(args):
    """SOURCE → OUT, or OUT.pack."""
    truth = {}
    if folder_of(args.source, "train") is None and any(args.source.rglob("*.parquet")):
        units, read = parquet_units(args.source), parquet_pictures
    else:
        units, read = folder_units(args.source), folder_pictures
        if flat := [unit.path for unit in units if unit.kind is None]:
            truth = classes_of(args, flat[0])
    place = args.out
    if args.pack and place.suffix != packs.ENDING:
        place = place.with_name(place.name + packs.ENDING)
    made_from = [[unit.path.relative_to(args.source).as_posix(), unit.split] for unit in units]
    grown = growing.Growing(place.parent, place.name, growing.made_of(args, made_from),
                            [(place.name, place)])
    if not grown.finished:
        pictures = growing.Pictures(grown, place.name)
        with growing.bar(len(units), "imagenet", grown.done, " parts") as shown:
            for unit in grown.units(units):
                for kind, name, source in read(unit, truth):
                    add(args, pictures, f"{unit.split}/{kind}/{name}", source)
                    classes = grown.counts.setdefault(unit.split, {})
                    classes[kind] = classes.get(kind, 0) + 1
                pictures.commit()
                shown.update()
        train, val = (grown.counts.get(split, {}).keys() for split in ("train", "val"))
        if alone := sorted(train ^ val):
            raise SystemExit(f"error: {args.source}: class {alone[0]} is not in both train and val "
                             f"({len(alone)} such); is a part missing? Delete {grown.work}, and "
                             f"begin anew with all of them")
        pictures.close()
        grown.finish()
    print0(f"{place}: {len(grown.counts['train']):,} classes, {grown.pictures_said()}\n"
           f"Next:  python probe_linear.py --encoder siglip2-so400m --data {place}")


def add(args, pictures, name, source):
    """A picture, from bytes or from a file, which is linked where it stays as it is."""
    if isinstance(source, bytes):
        pictures.add(name, growing.shrunk(source, args.max_side))
    elif args.max_side:
        pictures.add(name, growing.shrunk(Path(source).read_bytes(), args.max_side))
    else:
        pictures.link(name, source)


# --------------------------------------------------------------------------------------- parquet

def parquet_units(source):
    """The files of train and validation, each opened once; raises SystemExit."""
    paths = [path for found in parquet.parts_in(source).values() for path in found]
    units = []
    for number, path in enumerate(paths):
        split = SPLITS.get(path.name.split("-")[0]) or SPLITS.get(path.parent.name)
        if split:                                                # test has no labels
            parquet.count(path, COLUMNS)
            units.append(Unit(split, path, number))
    if {unit.split for unit in units} != {"train", "val"}:
        raise SystemExit(f"error: {source} needs train-*.parquet and validation-*.parquet")
    return units


def parquet_pictures(unit, _):
    """Yield (class, name, bytes). The class is the WordNet id in the picture's name, and the name
    is ILSVRC2012's own; where it has none, the label's number, and the row's."""
    for number, row in enumerate(parquet.rows(unit.path, COLUMNS)):
        where = f"{unit.path}:row {number}"
        raw, label = parquet.picture(row, where), row["label"]
        if raw is None or label is None or label < 0:
            raise SystemExit(f"error: {where}: no {'picture' if raw is None else 'label'}")
        if known := FILE.fullmatch(os.path.basename(row["image"].get("path") or "")):
            stem, kind, ending = known.groups()
            yield kind, stem + ending, raw
        else:
            name = f"{unit.kind:05d}-{number:06d}.{growing.ending_of(raw)}"
            yield f"{label:04d}", name, raw


# --------------------------------------------------------------------------------------- folders

def folder_of(source, split):
    """Where ILSVRC2012's own folders have a split, or None."""
    for above in ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"):
        for name in (split, f"ILSVRC2012_img_{split}"):
            folder = source / above / name
            some = itertools.islice(os.scandir(folder), 10) if folder.is_dir() else ()
            if any(entry.is_dir() or entry.name.endswith(".JPEG") for entry in some):
                return folder
    return None


def folder_units(source):
    """train/CLASS/ and val/CLASS/, or a flat val/, as units; raises SystemExit."""
    units = []
    for split in ("train", "val"):
        folder = folder_of(source, split)
        if folder is None:
            raise SystemExit(f"error: no {split}/ with pictures in {source}, and no parquet; "
                             f"unpack ILSVRC2012_img_{split}.tar there")
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if split == "train" and not classes:
            raise SystemExit(f"error: no class folders in {folder}; unpack each of the 1,000 "
                             f"archives of ILSVRC2012_img_train.tar into a folder of its name")
        units += [Unit(split, folder / name, name) for name in classes] or \
            [Unit(split, folder, None)]
    return units


def folder_pictures(unit, truth):
    """Yield (class, name, path)."""
    for path in images.pictures_in([unit.path])[unit.path]:
        kind = unit.kind or truth.get(Path(path).stem)
        if kind is None:
            raise SystemExit(f"error: {path}: the ground truth does not name it")
        yield kind, Path(path).name, path


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
