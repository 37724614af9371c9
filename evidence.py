"""All the evidence of a run in one table: the original encoder, SFT's and DPO's, side by side.

    python evidence.py --run runs/toy-vit__toy-lm

Reads what repair_eval.py and the four instruments wrote in the run folder, and runs nothing itself;
where one has not been run yet, its line is empty and the command that fills it is named. In percent
but for the alignment. The difference is paired where the instrument pairs (by test image, by
subset, by preference pair), with the interval it states; see each instrument for what it means.
"""
import argparse
from pathlib import Path

import encoders
import runtime

COLUMNS = ("original", "SFT", "DPO", "DPO - SFT")


def number(value, sign=""):
    return "–" if value is None else f"{100 * value:{sign}.1f}"


def interval(mean, low, high):
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def repaired(run, names):
    """Scores of each frozen encoder under a new LLM: [(label, cells)], by group and in all."""
    found = [run / "repair" / name / "bench" / "results.json" for name in names]
    found = [encoders.read_json(p, "groups", "average") if p.exists() else None for p in found]
    rows = []
    for label in dict.fromkeys(g for r in found if r for g in r["groups"]):
        rows.append((f"  {label}", [r and r["groups"].get(label) for r in found]))
    if rows:
        rows.append(("  average", [r and r["average"] for r in found]))
    for _, cells in rows:
        cells[:] = [None if c is None else c / 100 for c in cells]
        sft, dpo = cells[1:]
        cells[:] = [*map(number, cells), number(None if None in (sft, dpo) else dpo - sft, "+")]
    return rows


def linear(facts, names):
    scores, apart = facts["encoders"], facts["differences"].get(f"{names[2]} - {names[1]}")
    return [("top-1", [number(scores[n]["top1"]["mean"]) if n in scores else "–" for n in names]
             + [interval(apart["top1"]["mean"], *apart["top1"]["ci95"]) if apart else "–"])]


def segmentation(facts, names):
    def mean(values):
        return sum(values) / len(values)
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
    half = apart["ci95"] or float("nan")
    return [("inside the object", [f"chance {number(share['chance']['mean'])}",
                                   number(sft["mean"]), number(dpo["mean"]),
                                   interval(apart["mean"], apart["mean"] - half,
                                            apart["mean"] + half)])]


# heading, folder below probes/, how it is read, its picture, the command that makes it
INSTRUMENTS = (
    ("Linear classification", "linear", linear, None,
     "python probe_linear.py --encoder {three} --data {data}/imagenet"),
    ("Segmentation", "seg", segmentation, "overlays.png",
     "python probe_seg.py --encoder {three} --data {data}/ade20k"),
    ("Alignment, mutual k-NN", "align", alignment, "align.png",
     "python probe_align.py --encoder {three} --llm {llm} --data {data}/align"),
    ("Gradient of each loss at stage 1", "gradcam", heat, "gradcam.png",
     "python gradcam.py --run {run} --num-samples 120"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", "--run", dest="run", metavar="DIR", required=True,
                        help="run folder, e.g. runs/toy-vit__toy-lm")
    run = Path(parser.parse_args().run)
    made_with = encoders.read_json(run / "pretrain" / "config.json", "arguments")["arguments"]
    names = [encoders.short_name(made_with["encoder"]), "sft", "dpo"]
    three = f"{made_with['encoder']} {run}/sft/encoder {run}/dpo/encoder"
    words = {"three": three, "run": run, "data": made_with["data"], "llm": made_with["llm"]}

    table, pictures, missing = [], [], []
    rows = repaired(run, names)
    table += [("Re-paired with a new LLM", [""] * 4), *rows] if rows else []
    missing += [f"python repair_eval.py --encoder {e} --llm {made_with['llm']} --data "
                f"{made_with['data']}" for e, n in zip(three.split(), names)
                if not (run / "repair" / n / "bench" / "results.json").exists()]
    for heading, folder, read, picture, command in INSTRUMENTS:
        path = run / "probes" / folder / "results.json"
        if not path.exists():
            missing.append(command.format(**words))
            continue
        table.append((heading, [""] * 4))
        table += [(f"  {label}", cells) for label, cells in read(encoders.read_json(path), names)]
        pictures += [path.with_name(picture)] if picture else []
    wide = [max(map(len, column)) for column in zip(*(cells for _, cells in table), COLUMNS)]
    left = max((len(label) for label, _ in table), default=0)
    for label, cells in [("", COLUMNS), *table]:
        print((f"{label:<{left}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, wide))).rstrip())
    for picture in pictures:
        print(f"picture: {picture}")
    for command in missing:
        print(f"not run yet: {command}")


if __name__ == "__main__":
    runtime.launch(main)
