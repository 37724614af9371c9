"""All the evidence of a run in one table: the original encoder and each stage's, side by side.

    python -m tools.evidence --run-dir runs/toy-vit__toy-lm [--stages sft dpo]

Reads what repair_eval.py and the four instruments wrote in the run folder, and runs nothing itself;
where one has not been run yet, it is left out and the command that runs it is named. In percent
but for the alignment. Differences are to the first of the stages, paired (by question, by test
image, by subset, by preference pair), with the interval their instrument states; see there for what
it means.
"""
import math
from pathlib import Path
from shlex import quote
from statistics import mean
from typing import NamedTuple

from judge import report, score
from pivot import distributed, encoders, files, flags, printing


class Cell(NamedTuple):
    """A number, its interval (None: unknown), and how the table says it."""
    value: float
    low: float | None
    high: float | None
    text: str


def percent(value, low=None, high=None):
    """Of a share."""
    value, low, high = (None if x is None else 100 * x for x in (value, low, high))
    return Cell(value, low, high, f"{value:.1f}")


def points(value, low, high):
    """A difference in percent, with its interval."""
    return Cell(value, low, high, f"{value:+.1f} [{low:+.1f}, {high:+.1f}]")


def half_of(results, what):
    """Half the interval of a benchmark's score, of a group's or of the average: of a mean of
    independent scores."""
    halves = [r["ci95"] for name, r in results["benchmarks"].items()
              if what in (name, score.BENCHES[name].group, "Average")]
    return None if None in halves else math.sqrt(sum(h * h for h in halves)) / len(halves)


def scores_of(found, stages):
    """Rows of scored models, by group and in all. found: {name: (path, results.json)}; stages: who
    is compared, the first being what others are compared with."""
    means, apart = {n: report.means_of(r) for n, (_, r) in found.items()}, {}
    there = [n for n in stages if n in found]
    if len(there) > 1 and there[0] == stages[0]:
        rows = report.changes({n: found[n][1] for n in there},
                              {n: report.units_beside(found[n][0]) for n in there})
        apart = {label: {n: points(*c) for n, c in zip(there[1:], cells) if c}
                 for label, *cells in rows}
    labels = [x for x in (*score.GROUPS, "Average") if any(x in m for m in means.values())]
    out = []
    for x in labels:
        cells = {}
        for n, m in means.items():
            if x in m:
                half = half_of(found[n][1], x)
                ends = (None, None) if half is None else (m[x] - half, m[x] + half)
                cells[n] = Cell(m[x], *ends, f"{m[x]:.1f}")
        out.append((x, cells, apart.get(x, {})))
    return out


# Each reads an instrument's results.json: → [(label, {name: Cell}, {name: Cell of its difference to
# the first stage}), …]. names: the original encoder, then the stages.

def repaired(run, names):
    """Scores of each frozen encoder under a new LLM, by group and in all."""
    paths = {name: run / "repair" / name / "bench" / "results.json" for name in names}
    found = {n: (p, files.read_json(p, "benchmarks", "groups", "average"))
             for n, p in paths.items() if p.exists()}
    return scores_of(found, names[1:])


def linear(facts, names):
    scores, apart = {}, {}
    for name in names:
        if name in facts["encoders"]:
            top1 = facts["encoders"][name]["top1"]
            scores[name] = percent(top1["mean"], *top1["ci95"])
        if change := facts["differences"].get(f"{name} - {names[1]}"):
            apart[name] = points(*(100 * x for x in (change["top1"]["mean"],
                                                     *change["top1"]["ci95"])))
    return [("top-1", scores, apart)]


def segmentation(facts, names):
    scores, apart = {}, {}
    for name in names:
        if name in facts["encoders"]:
            scores[name] = percent(mean(facts["encoders"][name]["recall"]))
        if change := facts["differences"].get(f"{name} - {names[1]}"):
            apart[name] = points(*(100 * x for x in (mean(change["recall"]),
                                                     *change["recall_ci95"])))
    return [("recall of patches", scores, apart)]


def around(spread, text):
    """Mean ± standard deviation over subsets."""
    middle, sd = spread["mean"], spread["sd"]
    ends = (None, None) if sd is None else (middle - sd, middle + sd)
    return Cell(middle, *ends, text)


def alignment(facts, names):
    rows = []
    for llm in dict.fromkeys(s["llm"] for s in facts["scores"]):
        scores = {s["encoder"]: around(s, s["text"]) for s in facts["scores"] if s["llm"] == llm}
        apart = {}
        for name in names:
            if change := facts["paired"].get(f"{name} - {names[1]}, {llm}"):
                spread = "" if change["sd"] is None else f" ±{change['sd']:.4f}"
                apart[name] = around(change, f"{change['mean']:+.4f}{spread}")
        rows.append((f"with {llm}", scores, apart))
    return rows


def heat(facts, names):
    """Not of encoders: of the SFT and the DPO loss, at one model; chance stands at the original."""
    found = {}
    for what, row in facts["share_inside"].items():
        middle, half = row["mean"], row["ci95"]          # no interval of a single picture
        found[what] = percent(middle) if half is None else \
            percent(middle, middle - half, middle + half)
    if "SFT" not in found:
        return [("inside the object", {}, {})]
    change, chance = found["DPO - SFT"], found["chance"]
    change = change._replace(text=f"{change.value:+.1f}") if change.low is None else \
        points(*change[:3])
    return [("inside the object", {names[0]: chance._replace(text=f"chance {chance.text}"),
                                   "sft": found["SFT"], "dpo": found["DPO"]}, {"dpo": change})]


# heading, folder below probes/, how it is read, its picture, the command that makes it
INSTRUMENTS = (
    ("Linear classification", "linear", linear, None,
     "python probe_linear.py --encoder {all} --data {data}/imagenet"),
    ("Segmentation", "seg", segmentation, "overlays.png",
     "python probe_seg.py --encoder {all} --data {data}/ade20k"),
    ("Alignment, mutual k-NN", "align", alignment, "align.png",
     "python probe_align.py --encoder {all} --llm {llm} --data {data}/align"),
    ("Gradient of each loss at stage 1", "gradcam", heat, "gradcam.png",
     "python gradcam.py --run-dir {run} --num-samples 120"))


def stages_of(run):
    """The stages that went on from another one: SFT's folder first, where there is one, then in the
    order of their training."""
    found = []
    for path in run.glob("*/final/config.json"):
        config = path.parent.parent / "config.json"
        if config.exists() and "parent_digest" in files.read_json(config):
            found.append((path.parent.parent.name != "sft", config.stat().st_mtime,
                          path.parent.parent.name))
    return [name for *_, name in sorted(found)]


def made_with_of(run):
    """The arguments of stage 1, or of another stage where that lies elsewhere (--parent) or was
    published, with no data of its own (tools.parent)."""
    first = run / "pretrain" / "config.json"
    for config in (first, *sorted(run.glob("*/config.json"))):
        if config.exists():
            made_with = files.read_json(config).get("arguments", {})
            if made_with.get("data"):
                return made_with
    raise SystemExit(f"error: {run} holds no stage that was trained on data: no {first}")


def original_name(encoder):
    """What the instruments call the encoder that a run began with (judge.probing.short_names); it
    need not be there any more."""
    path = Path(encoder)
    return path.parent.name.lower() if path.name == "encoder" else encoders.short_name(encoder)


def heading_of(stage):
    """sft, dpo → SFT, DPO; another stage by its own name."""
    return stage.upper() if len(stage) <= 4 else stage


class Evidence(NamedTuple):
    """What is known of a run. names: the original encoder, then the stages; sections: [(heading,
    rows as the functions above give them), …]; pictures: paths; missing: commands not run yet."""
    names: list
    sections: list
    pictures: list
    missing: list


def gather(run, stages=None):
    """All the evidence of a run folder; stages: None for all of the run."""
    run = Path(run)
    stages = stages or stages_of(run) or ["sft", "dpo"]
    made_with = made_with_of(run)
    names = [original_name(made_with["encoder"]), *stages]
    folders = [made_with["encoder"], *(f"{run}/{stage}/encoder" for stage in stages)]
    llm = made_with["llm"]             # of a published parent there is its config alone
    llm = "LLM" if Path(llm).is_dir() and not [*Path(llm).glob("*.safetensors")] else llm
    size = f" --image-size {made_with['image_size']}" if made_with.get("image_size") else ""
    words = {"all": " ".join(map(quote, folders)) + size, "run": quote(str(run)),
             "data": quote(made_with["data"]), "llm": quote(llm)}
    sections, pictures, missing = [("Re-paired with a new LLM", repaired(run, names))], [], []
    for folder, name in zip(folders, names):
        if not (run / "repair" / name / "bench" / "results.json").exists():
            missing.append("python repair_eval.py --encoder {} --llm {llm} --data {data} "
                           "--run-dir {run}".format(quote(folder), **words) + size)
    for heading, folder, read, picture, command in INSTRUMENTS:
        path = run / "probes" / folder / "results.json"
        if not path.exists():
            missing.append(command.format(**words))
            continue
        sections.append((heading, read(files.read_json(path), names)))
        if picture:
            pictures.append(path.with_name(picture))
    return Evidence(names, sections, pictures, missing)


def main():
    parser = flags.Parser(__doc__)
    parser.add_argument("--run-dir", "--run", dest="run", metavar="DIR", required=True,
                        help="run folder, e.g. runs/toy-vit__toy-lm")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="which stages to show, the "
                        "first being what others are compared with (default: all of the run)")
    args = parser.parse_args()
    names, sections, pictures, missing = gather(args.run, args.stages)
    first, *others = names[1:]
    rows = [["", "original", *map(heading_of, names[1:]),
             *(f"{heading_of(other)} - {heading_of(first)}" for other in others)]]
    for heading, lines in sections:
        if lines:
            rows.append([heading, *[""] * (len(rows[0]) - 1)])
        for label, cells, apart in lines:
            rows.append([f"  {label}", *(cells[n].text if n in cells else "–" for n in names),
                         *(apart[n].text if n in apart else "–" for n in others)])
    print("\n".join(printing.table(rows)))
    for picture in pictures:
        print(f"picture: {picture}")
    for command in missing:
        print(f"not run yet: {command}")


if __name__ == "__main__":
    distributed.launch(main)
