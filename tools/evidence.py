"""All the evidence of a run in one table: the original encoder, SFT's and DPO's, side by side.

    python -m tools.evidence --run-dir runs/toy-vit__toy-lm

Reads what repair_eval.py and the four instruments wrote in the run folder, and runs nothing itself;
where one has not been run yet, its line is empty and the command that fills it is named. In percent
but for the alignment. The difference is paired (by question, by test image, by subset, by
preference pair), with the interval its instrument states; see there for what it means.
"""
from pathlib import Path
from statistics import mean

from pivot import encoders
from pivot import flags
from judge import report
from pivot import runtime
from judge import score

COLUMNS = ("original", "SFT", "DPO", "DPO - SFT")


def number(value):
    return f"{100 * value:.1f}"


def interval(mean, low, high):
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def repaired(run, names):
    """Scores of each frozen encoder under a new LLM: [(label, cells), …], by group and in all; the
    difference as --compare prints it."""
    paths = {name: run / "repair" / name / "bench" / "results.json" for name in names}
    found = {n: encoders.read_json(p, "benchmarks", "groups", "average")
             for n, p in paths.items() if p.exists()}
    means = {n: report.means_of(r) for n, r in found.items()}
    apart, two = {}, names[1:]
    if found.keys() >= {*two}:
        apart = dict(report.differences({n: found[n] for n in two},
                                        {n: report.units_beside(paths[n]) for n in two}))
    labels = [x for x in (*score.GROUPS, "Average") if any(x in m for m in means.values())]
    return [(x, [*(f"{means[n][x]:.1f}" if x in means.get(n, {}) else "–" for n in names),
                 apart.get(x, "–")]) for x in labels]


def linear(facts, names):
    scores, apart = facts["encoders"], facts["differences"].get(f"{names[2]} - {names[1]}")
    return [("top-1", [number(scores[n]["top1"]["mean"]) if n in scores else "–" for n in names]
             + [interval(apart["top1"]["mean"], *apart["top1"]["ci95"]) if apart else "–"])]


def segmentation(facts, names):
    scores, apart = facts["encoders"], facts["differences"].get(f"{names[2]} - {names[1]}")
    return [("recall of patches",
             [number(mean(scores[n]["recall"])) if n in scores else "–" for n in names]
             + [interval(mean(apart["recall"]), *apart["recall_ci95"]) if apart else "–"])]


def alignment(facts, names):
    rows = []
    for llm in dict.fromkeys(s["llm"] for s in facts["scores"]):
        found = {s["encoder"]: s["text"] for s in facts["scores"] if s["llm"] == llm}
        apart = facts["paired"].get(f"{names[2]} - {names[1]}, {llm}")
        rows.append((f"with {llm}", [found.get(n, "–") for n in names]
                     + [f"{apart['mean']:+.4f}" + ("" if apart["sd"] is None else
                        f" ±{apart['sd']:.4f}") if apart else "–"]))
    return rows


def heat(facts, names):
    """Not of three encoders: of the two losses, at one model; where chance is, stands chance."""
    share = facts["share_inside"]
    if "SFT" not in share:
        return [("inside the object", ["–"] * 4)]
    sft, dpo, apart = (share[k] for k in ("SFT", "DPO", "DPO - SFT"))
    half = apart["ci95"]                                 # none of a single picture
    return [("inside the object", [
        f"chance {number(share['chance']['mean'])}", number(sft["mean"]), number(dpo["mean"]),
        f"{100 * apart['mean']:+.1f}" if half is None else
        interval(apart["mean"], apart["mean"] - half, apart["mean"] + half)])]


# heading, folder below probes/, how it is read, its picture, the command that makes it
INSTRUMENTS = (
    ("Linear classification", "linear", linear, None,
     "python probe_linear.py --encoder {three} --data {data}/imagenet"),
    ("Segmentation", "seg", segmentation, "overlays.png",
     "python probe_seg.py --encoder {three} --data {data}/ade20k"),
    ("Alignment, mutual k-NN", "align", alignment, "align.png",
     "python probe_align.py --encoder {three} --llm {llm} --data {data}/align"),
    ("Gradient of each loss at stage 1", "gradcam", heat, "gradcam.png",
     "python gradcam.py --run-dir {run} --num-samples 120"))


def main():
    parser = flags.Parser(__doc__)
    parser.add_argument("--run-dir", "--run", dest="run", metavar="DIR", required=True,
                        help="run folder, e.g. runs/toy-vit__toy-lm")
    run = Path(parser.parse_args().run)
    made_with = encoders.read_json(run / "pretrain" / "config.json", "arguments")["arguments"]
    names = [encoders.short_name(made_with["encoder"]), "sft", "dpo"]
    three = [made_with["encoder"], f"{run}/sft/encoder", f"{run}/dpo/encoder"]
    words = {"three": " ".join(three), "run": run, "data": made_with["data"],
             "llm": made_with["llm"]}

    sections, pictures = [("Re-paired with a new LLM", repaired(run, names))], []
    missing = [f"python repair_eval.py --encoder {e} --llm {made_with['llm']} --data "
               f"{made_with['data']} --run-dir {run}" for e, n in zip(three, names)
               if not (run / "repair" / n / "bench" / "results.json").exists()]
    for heading, folder, read, picture, command in INSTRUMENTS:
        path = run / "probes" / folder / "results.json"
        if not path.exists():
            missing.append(command.format(**words))
            continue
        sections.append((heading, read(encoders.read_json(path), names)))
        pictures += [path.with_name(picture)] if picture else []
    rows = [["", *COLUMNS]]
    for heading, lines in sections:
        rows += [[heading, *[""] * 4]] if lines else []
        rows += [[f"  {label}", *cells] for label, cells in lines]
    print("\n".join(report.grid(rows)))
    for picture in pictures:
        print(f"picture: {picture}")
    for command in missing:
        print(f"not run yet: {command}")


if __name__ == "__main__":
    runtime.launch(main)
