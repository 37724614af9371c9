"""All the evidence of a run in one table: the original encoder and each stage's, side by side.

    python -m tools.evidence --run-dir runs/toy-vit__toy-lm [--stages sft dpo]

Reads what repair_eval.py and the four instruments wrote in the run folder, and runs nothing itself;
where one has not been run yet, it is left out and the command that runs it is named. In percent
but for the alignment. Differences are to the first of the stages, paired (by question, by test
image, by subset, by preference pair), with the interval their instrument states; see there for what
it means.
"""
from pathlib import Path
from statistics import mean

from judge import probing, report, score
from pivot import distributed, files, flags, printing


def percent(value):
    return f"{100 * value:.1f}"


def interval(middle, low, high):
    return f"{100 * middle:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


# Each reads an instrument's results.json: → [(label, {name: cell}, {name: cell of its difference to
# the first stage}), …]. names: the original encoder, then the stages.

def repaired(run, names):
    """Scores of each frozen encoder under a new LLM, by group and in all."""
    paths = {name: run / "repair" / name / "bench" / "results.json" for name in names}
    found = {n: files.read_json(p, "benchmarks", "groups", "average")
             for n, p in paths.items() if p.exists()}
    means = {n: report.means_of(r) for n, r in found.items()}
    stages, apart = [n for n in names[1:] if n in found], {}
    if len(stages) > 1 and stages[0] == names[1]:
        rows = report.differences({n: found[n] for n in stages},
                                  {n: report.units_beside(paths[n]) for n in stages})
        apart = {label: dict(zip(stages[1:], cells)) for label, *cells in rows[1:]}
    labels = [x for x in (*score.GROUPS, "Average") if any(x in m for m in means.values())]
    return [(x, {n: f"{m[x]:.1f}" for n, m in means.items() if x in m}, apart.get(x, {}))
            for x in labels]


def linear(facts, names):
    scores, apart = {}, {}
    for name in names:
        if name in facts["encoders"]:
            scores[name] = percent(facts["encoders"][name]["top1"]["mean"])
        if change := facts["differences"].get(f"{name} - {names[1]}"):
            apart[name] = interval(change["top1"]["mean"], *change["top1"]["ci95"])
    return [("top-1", scores, apart)]


def segmentation(facts, names):
    scores, apart = {}, {}
    for name in names:
        if name in facts["encoders"]:
            scores[name] = percent(mean(facts["encoders"][name]["recall"]))
        if change := facts["differences"].get(f"{name} - {names[1]}"):
            apart[name] = interval(mean(change["recall"]), *change["recall_ci95"])
    return [("recall of patches", scores, apart)]


def alignment(facts, names):
    rows = []
    for llm in dict.fromkeys(s["llm"] for s in facts["scores"]):
        scores = {s["encoder"]: s["text"] for s in facts["scores"] if s["llm"] == llm}
        apart = {}
        for name in names:
            if change := facts["paired"].get(f"{name} - {names[1]}, {llm}"):
                spread = "" if change["sd"] is None else f" ±{change['sd']:.4f}"
                apart[name] = f"{change['mean']:+.4f}{spread}"
        rows.append((f"with {llm}", scores, apart))
    return rows


def heat(facts, names):
    """Not of encoders: of the SFT and the DPO loss, at one model; chance stands at the original."""
    share = facts["share_inside"]
    if "SFT" not in share:
        return [("inside the object", {}, {})]
    change = share["DPO - SFT"]
    middle, half = change["mean"], change["ci95"]        # no interval of a single picture
    return [("inside the object",
             {names[0]: f"chance {percent(share['chance']['mean'])}",
              "sft": percent(share["SFT"]["mean"]), "dpo": percent(share["DPO"]["mean"])},
             {"dpo": f"{100 * middle:+.1f}" if half is None else
              interval(middle, middle - half, middle + half)})]


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


def made_with_of(run, stages):
    """The arguments of stage 1, or of the first stage where that lies elsewhere (--parent) or was
    published, with no data of its own (tools.parent)."""
    first = run / "pretrain" / "config.json"
    for config in (first, *(run / stage / "config.json" for stage in stages)):
        if config.exists():
            made_with = files.read_json(config, "arguments")["arguments"]
            if made_with["data"]:
                return made_with
    raise SystemExit(f"error: no {first}, and no stage that went on from elsewhere")


def heading_of(stage):
    """sft, dpo → SFT, DPO; another stage by its own name."""
    return stage.upper() if len(stage) <= 4 else stage


def main():
    parser = flags.Parser(__doc__)
    parser.add_argument("--run-dir", "--run", dest="run", metavar="DIR", required=True,
                        help="run folder, e.g. runs/toy-vit__toy-lm")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="which stages to show, the "
                        "first being what others are compared with (default: all of the run)")
    args = parser.parse_args()
    run = Path(args.run)
    stages = args.stages or stages_of(run) or ["sft", "dpo"]
    made_with = made_with_of(run, stages)
    names = [*probing.short_names([made_with["encoder"]]), *stages]
    folders = [made_with["encoder"], *(f"{run}/{stage}/encoder" for stage in stages)]
    llm = made_with["llm"]             # of a published parent there is its config alone
    llm = "LLM" if Path(llm).is_dir() and not [*Path(llm).glob("*.safetensors")] else llm
    size = f" --image-size {made_with['image_size']}" if made_with.get("image_size") else ""
    words = {"all": " ".join(folders) + size, "run": run, "data": made_with["data"],
             "llm": llm}

    sections, pictures, missing = [("Re-paired with a new LLM", repaired(run, names))], [], []
    for folder, name in zip(folders, names):
        if not (run / "repair" / name / "bench" / "results.json").exists():
            missing.append(f"python repair_eval.py --encoder {folder} --llm {llm} "
                           f"--data {made_with['data']} --run-dir {run}{size}")
    for heading, folder, read, picture, command in INSTRUMENTS:
        path = run / "probes" / folder / "results.json"
        if not path.exists():
            missing.append(command.format(**words))
            continue
        sections.append((heading, read(files.read_json(path), names)))
        if picture:
            pictures.append(path.with_name(picture))
    first, *others = stages
    rows = [["", "original", *map(heading_of, stages),
             *(f"{heading_of(other)} - {heading_of(first)}" for other in others)]]
    for heading, lines in sections:
        if lines:
            rows.append([heading, *[""] * (len(rows[0]) - 1)])
        for label, cells, apart in lines:
            rows.append([f"  {label}", *(cells.get(name, "–") for name in names),
                         *(apart.get(other, "–") for other in others)])
    print("\n".join(printing.table(rows)))
    for picture in pictures:
        print(f"picture: {picture}")
    for command in missing:
        print(f"not run yet: {command}")


if __name__ == "__main__":
    distributed.launch(main)
