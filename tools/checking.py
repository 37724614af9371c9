"""Is all of it readable? What `python -m tools.prepare` only reads: check, ade20k, benchmarks, and
the sets of pairs that it has unpacked. Every fault is printed, not the first alone. Writes nothing.
"""
import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import probe_linear
import probe_seg
from judge import answer
from pivot import distributed, images, packs, printing, records
from pivot.distributed import print0
from pivot.records import BadRecord
from tools.growing import bar, bar_over

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
    count, faults = 0, []

    def readable():
        try:
            yield from jobs
        except (SystemExit, BadRecord, packs.Damaged) as e:
            faults.append(str(e).removeprefix("error: "))
            print0(f"bad: {faults[-1]}")
    todo = readable()
    with ThreadPoolExecutor(distributed.cores()) as pool, bar(None, what, unit="") as shown:
        while some := list(itertools.islice(todo, 256)):
            for fault in filter(None, pool.map(lambda one: job(*one), some)):
                faults.append(fault)
                print0(f"bad: {fault}")
            count += len(some)
            shown.update(len(some))
    print0(f"{what}: {count:,} read, {len(faults):,} bad")
    return count, len(faults)


def check(args):
    """Everything in DATA's default layout."""
    data, total, bad = args.source, 0, 0
    root = args.images or packs.default_images(data)

    def look(what, jobs, job):
        nonlocal total, bad
        count, faults = faults_of(what, jobs, job)
        total, bad = total + count, bad + faults

    heldout, pairs = data / "preferences/heldout.jsonl", data / "align/pairs.jsonl"
    listed = [found for found in (
        (records.default_file(data, "captions"), root, records.caption_record),
        (records.default_file(data, "instruct"), root, records.conversation_record),
        (records.default_file(data, "repair"), root, records.conversation_record),
        (heldout, packs.default_images(heldout.parent), records.pair_record),
        (pairs, packs.default_images(pairs.parent), pair_of_probe)) if Path(found[0]).exists()]
    meta = data / "preferences/meta.json"
    if meta.exists():
        listed += [(file, folder, records.pair_record)
                   for file, folder in records.pair_sources(meta)]
    for file, folder, make in listed:
        look(str(file), records.read_lines(file), lambda where, item: fault_of(
            where, item, folder, make, args.follow_links))
    for tsv in sorted(data.glob("bench/*.tsv")):
        look(str(tsv), bench_jobs(tsv, args.follow_links), picture_fault)
    for folder in (data / "imagenet", data / f"imagenet{packs.ENDING}"):
        if folder.exists():
            look(str(folder), class_jobs(folder), picture_fault)
    if (data / "ade20k").exists():
        look(f"{data}/ade20k", mask_jobs(data / "ade20k"), mask_fault)
    for folder in sorted(set(packs_in(str(folder) for _, folder, _ in listed))):
        look(f"{folder}, CRCs", crc_jobs(folder), crc_fault)
    if not total + bad:
        raise SystemExit(f"error: nothing to check in {data}: no captions, instruct.jsonl, "
                         f"preferences/meta.json, bench/, align/, imagenet/ or ade20k/")
    if bad:
        raise SystemExit(f"error: {bad:,} bad of {total:,} in {data}, named above (a stage drops "
                         f"bad records with --skip-bad)")
    print0(f"{data}: {total:,} read, none bad")


def packs_in(folders):
    """The packs that these folders are, lie in, or hold."""
    for folder in folders:
        if place := packs.split(folder):
            yield place[0]
        else:
            yield from (str(path) for path in Path(folder).glob(f"*{packs.ENDING}")
                        if packs.is_pack(path))


def crc_jobs(folder):
    pack = packs.Pack(folder)
    for row in pack.index:
        yield pack, row


def crc_fault(pack, row):
    try:
        whole = pack.whole(row)
    except OSError as e:
        return str(e)
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
    print0(f"Next:  python probe_seg.py --encoder siglip2-so400m --data {args.source}")


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
    print0(f"Next:  python repair_eval.py --mllm runs/NAME/dpo/final --bench {args.source}")


def check_sets(path, meta, args):
    """Every pair of every set is read, and its picture looked for; a line a set with something to
    say."""
    bad, sources = 0, records.pair_sources(path)
    for (name, facts), (file, root) in zip(meta.items(), sources):
        count, faults = 0, []
        for where, item in bar_over(records.read_lines(file), name):
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
