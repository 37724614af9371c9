"""What each seed of the study is made of: its world, and pairs that are hard for its stage-1 model.

The model's answers to a pool of questions are drawn at temperature 1; what is wrong becomes the
rejected answer, as in MMPR where the truth is known. (Were the likeliest answers taken, every
chosen answer would be one the model believes less, and "prefer what you believe less" would settle
the pairs.) The controls change the rejected text alone, or the image alone.
plan.py calls all this; nothing here trains or answers.
"""
import json
import os
import random
import shutil
from collections import Counter, defaultdict

from judge.score import plain
from pivot import files
from toy import world as toy

KINDS = ("sampled", "swapped", "shuffled", "images", "easy")


def link(path, target):
    """path → target, relative, so that the whole study can be moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(os.path.relpath(target, path.parent))
    except FileExistsError:              # made before, or this moment by a run beside this one
        pass


def write(path, value):
    """JSON, written aside and renamed: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, value, sort_keys=True)


def draw(out, seed, world, validation):
    """The world of a seed, and beside its test benchmarks others of other images to choose learning
    rates on: `validation` questions a group, drawn with another seed. Its preference pairs ask for
    single words, as the benchmarks do: in a sentence a model may misquote the question, and such a
    pair is settled without looking."""
    with files.new_folder(out) as aside:
        drawn = toy.World(aside, seed, 1.0, sentences=0)
        toy.fill(drawn, world)
        other = toy.World(aside / "other", seed + 1000, 1.0)
        with other.bar:
            for name in toy.BENCH:
                other.bench(name, validation)
        os.replace(aside / "other" / "bench", aside / "validation")
        shutil.rmtree(aside / "other")


def pool_of(data):
    """The preference pairs of a world, in the order of its meta.json: [record, …]."""
    folder = data / "preferences"
    sets = json.loads((folder / "meta.json").read_text()).values()
    return [json.loads(line) for s in sets for line in
            (folder / s["annotation"]).read_text().splitlines()]


def write_pool(data):
    """The pairs' questions as a benchmark, DATA/pool/ToyGeneral.tsv, for the model to answer."""
    folder = data / "pool"
    folder.mkdir(exist_ok=True)
    link(folder / "images", data / "preferences" / "images")
    rows = ["index\timage_path\tquestion\tanswer"]
    rows += ["\t".join((r["id"], r["image"], r["question"].removeprefix("<image>\n"), r["chosen"]))
             for r in pool_of(data)]
    (folder / "ToyGeneral.tsv").write_text("\n".join(rows) + "\n")


def like(said, right):
    """What the model said in the form of the right answer: its final punctuation or none, its first
    letter large or small. Else the form alone would tell the two apart."""
    ends = ".!?,;: "
    said = " ".join(said.split()).rstrip(ends) + right[len(right.rstrip(ends)):]
    case = str.upper if right[:1].isupper() else str.lower if right[:1].islower() else str
    return case(said[:1]) + said[1:]


def wrong(said, right):
    """Is this answer of the model's fit to be rejected: other words than the right one, but as many
    (else DPO could learn the form)? An answer that differs in form alone is right."""
    said, right = plain(like(said, right)), plain(right)
    return said != right and len(said.split()) == len(right.split())


def asks(record):
    """What a record asks for: colour-00012 → colour."""
    return record["id"].rpartition("-")[0]


def kinds_of(pool, said, seed, n):
    """Pairs of every kind; pool: [record, …], said: {id: the model's answer}, n: so many easy ones.

    `sampled`, `swapped`, `shuffled` and `images` hold the same items in the same order: those that
    the model got wrong, with an answer that is right elsewhere ("star" is no count).
    → {kind: [record, …]}.
    """
    rng, known = random.Random(f"{seed}/kinds"), defaultdict(set)
    for r in pool:
        known[asks(r)].add(plain(r["chosen"]))
    items = [r for r in pool if wrong(said[r["id"]], r["chosen"])
             and plain(said[r["id"]]) in known[asks(r)]]
    rng.shuffle(items)
    out = {"swapped": items, "sampled": [{**r, "rejected": like(said[r["id"]], r["chosen"])}
                                         for r in items]}

    def others(i, differ):
        """The first item after the i-th, in a circle, that differs."""
        return next((o for o in items[i + 1:] + items[:i] if differ(o)), None)
    out["shuffled"] = [{**r, "rejected": o["chosen"]} for i, r in enumerate(items) if
                       (o := others(i, lambda o: plain(o["chosen"]) != plain(r["chosen"])))]
    out["images"] = [{**r, "image": o["image"]} for i, r in enumerate(out["sampled"]) if
                     (o := others(i, lambda o: o["image"] != r["image"]))]
    out["easy"] = rng.sample(pool, min(n, len(pool)))
    return {kind: out[kind] for kind in KINDS}


def blind(records):
    """The share of pairs that a rule settles without looking: of two answers, prefer the one that
    is chosen over the other more often in all other pairs. A draw counts half; 0.5: none is."""
    over = Counter((asks(r), r["chosen"], r["rejected"]) for r in records)

    def settled(kind, chosen, rejected):
        right, wrong = over[kind, chosen, rejected] - 1, over[kind, rejected, chosen]
        return (right > wrong) + (right == wrong) / 2
    return sum(settled(asks(r), r["chosen"], r["rejected"]) for r in records) / len(records)


def hard_pairs(data, bench, seed, plan):
    """Writes DATA/preferences/<kind>.jsonl from the answers in `bench`, and kinds.json with counts:
    the file that says that all are there. Pictures that no pair shows are deleted."""
    said = {}
    for file in sorted(bench.glob("ToyGeneral.*.jsonl")):
        for line in file.read_text().splitlines():
            item = json.loads(line)
            said[item["index"]] = item["prediction"]
    pool = pool_of(data)
    most = max(plan["pairs"], *plan["sizes"])
    kinds, folder = kinds_of(pool, said, seed, most), data / "preferences"
    if len(kinds["sampled"]) < plan["pairs"]:
        raise SystemExit(f"error: seed {seed}: the model got {len(kinds['sampled'])} of "
                         f"{len(pool)} questions usably wrong, {plan['pairs']} are needed")
    for kind, records in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    counts = {"pool": len(pool), **{k: len(v) for k, v in kinds.items()}}
    write(folder / "kinds.json", counts)
    shown = {r["image"] for records in kinds.values() for r in records}
    for image in {r["image"] for r in pool} - shown:
        for where in ("images", "masks"):
            (folder / where / image).unlink(missing_ok=True)
    same = [s["rejected"] == r["rejected"] for s, r in zip(kinds["sampled"], kinds["swapped"])]
    return {"counts": counts, "blind": {k: round(blind(v), 3) for k, v in kinds.items()},
            "sampled_is_swapped": round(sum(same) / len(same), 3)}
