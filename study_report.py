"""results/*/*.json of the controlled study → a table of findings, figures, the README's section.

    python study_report.py                        # results/summary.*, its figures, README.md
    python study_report.py --out results-quick --quick
    python study_report.py --against DIR          # did a seed that was run again give the same?

The unit is the seed. A finding is a difference taken inside each seed (the same world, the same
stage-1 model), its mean over seeds, and Student's 95 % interval: mean ± t · sd / √n. It *holds* if
the interval lies wholly on the paper's side of 0, *does not* if wholly on the other, else it is
*undecided*. A tie holds if the whole interval lies within ±TIE points, and does not if it excludes
0 and is not within. With fewer seeds than are registered nothing is decided. The list of findings was
fixed before any test split was read, and is never shortened: what was not run says so.
"""
import argparse
import json
import os
import re
from pathlib import Path
from statistics import mean, stdev

from study_pairs import write
from study_plan import FULL, QUICK

# Student's t for 1, 2, … degrees of freedom: the 97.5 % and the 80 % quantile.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
T80 = (1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883)
TIE = 2.0                                  # points within which two scores count as equal
GROUPS = ("General", "Knowledge", "OCR & Chart", "Vision-Centric")
BEGIN, END = "<!-- study -->", "<!-- /study -->"


# ------------------------------------------------------------------------------------ statistics

def interval(values):
    """Mean and half-width of Student's 95 % interval of a list, a value a seed; None for one."""
    if len(values) < 2:
        return mean(values), None
    return mean(values), T975[min(len(values) - 1, len(T975)) - 1] * stdev(values) / \
        len(values) ** 0.5


def verdict(values, side):
    """ "holds", "does not" or "undecided"; side: the paper's, "+" or "=" (a tie within TIE)."""
    middle, half = interval(values)
    if half is None:
        return "undecided"
    low, high = middle - half, middle + half
    if side == "=":
        return "holds" if -TIE <= low and high <= TIE else \
            "does not" if low > 0 or high < 0 else "undecided"
    return "holds" if low > 0 else "does not" if high < 0 else "undecided"


def smallest_effect(seeds, questions, discordant=0.1):
    """The smallest true difference, in points, that `seeds` seeds find 4 times in 5 (at 95 %)
    where two models differ in `discordant` of the answers to `questions` questions and in nothing
    else: (t.975 + t.80) √(discordant / questions / seeds). Training luck comes on top."""
    if seeds < 2:
        return None
    return 100 * (T975[seeds - 2] + T80[seeds - 2]) * (discordant / questions / seeds) ** 0.5


# -------------------------------------------------------------------------------------- findings

class Results:
    """All values there are: {(part, run without its seed): {seed: {condition: {measure: …}}}}."""

    def __init__(self, out):
        self.out, self.values, self.seconds, self.made = Path(out), {}, 0.0, {}
        for path in sorted(self.out.glob("*/*.json")):
            found = json.loads(path.read_text())
            self.seconds += found["seconds"]
            part, name = path.parent.name, path.stem
            seed = re.match(r"seed-(\d+)-?", name)
            key = (part, name[seed.end():] if seed else name)
            self.values.setdefault(key, {})[int(seed[1]) if seed else 0] = found["values"]

    def series(self, measure, part, run, condition):
        """{seed: value} of one measure."""
        return {seed: values[condition][measure]
                for seed, values in self.values.get((part, run), {}).items()
                if measure in values.get(condition, {})}

    def combined(self, terms, first=0):
        """Σ sign · value inside each seed, from `first` on, that has them all: [value, …]."""
        found = [(sign, self.series(*what)) for sign, what in terms]
        seeds = set.intersection(*(set(s) for _, s in found))
        return [sum(sign * s[seed] for sign, s in found) for seed in sorted(seeds)
                if seed >= first]

    def lost(self, terms):
        """How many seeds have none of it since a run that these terms need diverged."""
        seeds = set()
        for _, (_, part, run, condition) in terms:
            folder = f"size-{run}" if part == "size" else run or "main"
            for key in ((part, run), ("made", f"{folder}-{condition}"), ("made", folder),
                        ("made", "stage1")):
                seeds |= {s for s, v in self.values.get(key, {}).items() if "diverged" in (v or {})}
        return len(seeds)


def minus(measure, a, b):
    """The terms of a difference: measure of a minus that of b; each (part, run, condition)."""
    return [(1, (measure, *a)), (-1, (measure, *b))]


def main_of(condition, part="vqa"):
    """Where the main comparison keeps a condition's values."""
    return (part, "", condition)


def findings(plan):
    """[(part, the paper's finding, its number, side, terms), …] in the order of the README.

    The numbers are from the paper's tables (So400m with a 1.5B head, where it gives that one);
    the sizes stand in its proportions 3 : 5 : 10 : 20 : 40."""
    sizes = sorted([*plan["sizes"], plan["pairs"]])

    def at_size(n, condition):
        return main_of(condition) if n == plan["pairs"] else ("size", str(n), condition)
    dpo, sft = main_of("dpo"), main_of("sft")
    both = minus("vqa average", dpo, sft)
    out = [("vqa", "the model, average: DPO above SFT", "+1.9", "+", both)]
    out += [("vqa", f"the model, {g}: " + ("a tie" if g == "Knowledge" else "DPO above SFT"),
             "0" if g == "Knowledge" else "above 0", "=" if g == "Knowledge" else "+",
             minus(f"vqa {g}", dpo, sft)) for g in GROUPS]
    e_dpo, e_sft = main_of("dpo", "eye"), main_of("sft", "eye")
    out += [("eye", "linear probe of the encoder: DPO above SFT", "+1.8", "+",
             minus("linear", e_dpo, e_sft)),
            ("eye", "segmentation probe: DPO above SFT", "+0.6 to +1.2", "+",
             minus("seg", e_dpo, e_sft)),
            ("eye", "at stage 1, DPO's loss looks at the object more than SFT's", "pictures", "+",
             minus("heat", e_dpo, e_sft)),
            ("eye", "alignment with a language model (× 100): DPO above SFT", "above 0", "+",
             minus("align", e_dpo, e_sft))]
    r = {c: main_of(c, "repair") for c in ("original", "sft", "dpo")}
    out += [("repair", f"re-paired, average: {a} above {b}", p, "+",
             minus("repair average", r[x], r[y])) for a, x, b, y, p in
            (("DPO", "dpo", "the original", "original", "+3.2"),
             ("SFT", "sft", "the original", "original", "+2.2"),
             ("DPO", "dpo", "SFT", "sft", "+1.0"))]
    out += [("repair", f"re-paired, {g}: DPO above SFT", p, "+",
             minus(f"repair {g}", r["dpo"], r["sft"])) for g, p in
            zip(GROUPS, ("+1.2", "+0.4", "+1.7", "+0.7"))]
    gaps = [minus("vqa average", at_size(n, "dpo"), at_size(n, "sft")) for n in sizes]
    out += [("size", f"{n:,} pairs: DPO above SFT", p, "+", gap) for n, gap, p in
            zip(sizes, gaps, ("+4.0", "+3.0", "+1.9", "+1.9", "+1.8"))]
    out += [("size", "the gap is larger with the fewest pairs than with the most", "+2.2", "+",
             gaps[0] + [(-sign, what) for sign, what in gaps[-1]]),
            ("size", "DPO on the fewest pairs above SFT on the most", "+0.9", "+",
             minus("vqa average", at_size(sizes[0], "dpo"), at_size(sizes[-1], "sft")))]
    large = {c: ("head", "head-l", c) for c in ("sft", "dpo")}
    out += [("head", "DPO's encoder, linear probe: better through the larger head", "+4.4", "+",
             minus("linear", large["dpo"], e_dpo)),
            ("head", "DPO's encoder, re-paired: better through the larger head", "above 0", "+",
             minus("repair average", large["dpo"], r["dpo"])),
            ("head", "larger head, the model: DPO above SFT", "+2.7", "+",
             minus("vqa average", large["dpo"], large["sft"]))]
    eye = {c: ("encoder", "eye-l", c) for c in ("original", "sft", "dpo")}
    out += [("encoder", "larger encoder, the model: DPO above SFT", "+1.9", "+",
             minus("vqa average", eye["dpo"], eye["sft"])),
            ("encoder", "larger encoder, re-paired: DPO above the original", "+2.8", "+",
             minus("repair average", eye["dpo"], eye["original"])),
            ("encoder", "re-paired: the smaller encoder after DPO above the larger original",
             "+1.7", "+", minus("repair average", r["dpo"], eye["original"]))]
    for name, label, p in (("supervised", "class labels", "+2.2"), ("masked", "masking", "+2.9")):
        e = {c: ("pretrained", name, c) for c in ("original", "sft", "dpo")}
        out += [("pretrained", f"pretrained by {label}, re-paired: DPO above the original", p, "+",
                 minus("repair average", e["dpo"], e["original"])),
                ("pretrained", f"pretrained by {label}, re-paired: DPO above SFT", "not given", "+",
                 minus("repair average", e["dpo"], e["sft"]))]
    return out


def baseline(measure, condition="stage1"):
    """Where the main comparison keeps a measure's value at stage 1, or of the original encoder."""
    if measure.startswith("repair"):
        return main_of("original", "repair")
    return main_of(condition, "vqa" if measure.startswith("vqa") else "eye")


def against_stage1():
    """[(label, measure, part, extra conditions)] of the table of each minus stage 1."""
    return [*((f"the model, {g}", f"vqa {g}", "vqa") for g in (*GROUPS, "average")),
            ("linear probe", "linear", "eye"), ("segmentation", "seg", "eye"),
            ("alignment × 100", "align", "eye"),
            *((f"re-paired, {g} (minus the original)", f"repair {g}", "repair")
              for g in (*GROUPS, "average"))]


def control_rows():
    """What of the signal trains the eye: [(label, {measure: (part, run)}, condition, kind)]; minus
    stage 1 or, where a kind is named, minus its DPO."""
    main = {"vqa average": ("vqa", ""), "linear": ("eye", ""), "seg": ("eye", ""),
            "repair average": ("repair", "")}

    def other(kind):
        return {measure: ("controls", kind) for measure in main}
    return [("SFT, no rejected answer", main, "sft", None),
            ("DPO, the model's own wrong answer", main, "dpo", None),
            ("DPO, one attribute swapped", other("swapped"), "dpo", None),
            ("DPO, the right answer to another question", other("shuffled"), "dpo", None),
            ("DPO, the model's wrong answer, another image", other("images"), "dpo", None),
            ("SFT, easy items", other("easy"), "sft", None),
            ("DPO, easy items, one attribute swapped", other("easy"), "dpo", None),
            ("*DPO, own wrong answer, minus* one attribute swapped", main, "dpo", "swapped"),
            ("*DPO, own wrong answer, minus* another question's", main, "dpo", "shuffled"),
            ("*DPO, own wrong answer, minus* another image", main, "dpo", "images")]


def summarise(results, plan=FULL):
    """Everything the section and the figures show, as one JSON-able dict."""
    def cell(values):
        if not values:
            return None
        middle, half = interval(values)
        return {"mean": middle, "half": half, "by_seed": values, "n": len(values)}

    def decided(values, side, lost):
        """All registered seeds decide, or none do."""
        if len(values) == plan["seeds"]:
            return verdict(values, side)
        return (f"{len(values)} of {plan['seeds']} seeds" if values or lost else "not run yet") + \
            (f"; {lost} lost, diverged" if lost else "")
    found = []
    for part, text, paper, side, terms in findings(plan):
        values = results.combined(terms)
        found.append({"part": part, "finding": text, "paper": paper, "side": side,
                      "verdict": decided(values, side, results.lost(terms)), **(cell(values) or {})})
    untuned = {name: cell(results.combined(minus(m, main_of("dpo", part), main_of("sft", part)),
                                           plan["tuning_seeds"])) for name, m, part in
               (("the model", "vqa average", "vqa"), ("linear probe", "linear", "eye"),
                ("segmentation", "seg", "eye"), ("re-paired", "repair average", "repair"))}
    chosen = results.values.get(("lr", "chosen"), {}).get(0, {})
    rate = {method: v["rate"] for method, v in chosen.items()}
    found.append({"part": "lr", "finding": "best learning rate: DPO's below SFT's (no interval)",
                  "paper": "1e-6, 5e-6", "verdict": "not run yet", **({
                      "text": f"{rate['dpo']:g}, {rate['sft']:g}",
                      "verdict": "holds" if rate["dpo"] < rate["sft"] else
                      "does not" if rate["dpo"] > rate["sft"] else "undecided"} if rate else {})})
    each = []
    for label, measure, part in against_stage1():
        before = baseline(measure)
        each.append({"measure": label, "stage1": cell(results.combined([(1, (measure, *before))])),
                     **{c: cell(results.combined(minus(measure, main_of(c, part), before)))
                        for c in ("sft", "dpo")}})
    controls = [{"trained": label, **{m: cell(results.combined(
        minus(m, (*where, condition), ("controls", kind, "dpo") if kind else baseline(m))))
        for m, where in runs.items()}} for label, runs, condition, kind in control_rows()]
    kinds = results.values.get(("made", "pairs"), {})
    rates = {m: [{"rate": rate, **(cell(results.combined([(1, (
        "vqa average", "lr", f"{m}-{rate:g}", m))])) or {"mean": None})}
                 for rate in plan["rates"]] for m in ("sft", "dpo")}
    return {"seeds": len(results.values.get(("vqa", ""), {})), "findings": found,
            "each_minus_stage1": each, "controls": controls,
            "chosen": rate, "rates": rates, "untuned": untuned,
            "edge": [m for m in rate if rate[m] in (plan["rates"][0], plan["rates"][-1])],
            "hours_of_one_core": round(results.seconds / 3600, 1),
            "wrong_answers": {str(s): v["counts"] for s, v in kinds.items()},
            "smallest_effect": {"group": smallest_effect(5, plan["world"]["bench"]),
                                "average": smallest_effect(5, 4 * plan["world"]["bench"]),
                                "linear": smallest_effect(5, 12 * plan["world"]["imagenet_val"])}}


# ------------------------------------------------------------------------------------ the section

def show(cell, sign="+"):
    """A cell as text: its mean and interval in points, or a dash."""
    if not cell or cell.get("mean") is None:
        return (cell or {}).get("text", "–")
    if cell["half"] is None:
        return f"{cell['mean']:{sign}.1f}"
    return f"{cell['mean']:{sign}.1f} [{cell['mean'] - cell['half']:{sign}.1f}, " \
           f"{cell['mean'] + cell['half']:{sign}.1f}]"


def section(summary, plan=FULL):
    """The README's section: what was asked, what came out, what it cannot see. Markdown."""
    s, effect = summary, summary["smallest_effect"]
    out = ["`make reproduce` runs the paper's comparison at toy scale, with seeds; "
           "[results/README.md](results/README.md) fixed its plan, its findings and its interval "
           "before any test split was read. In percentage points, mean [95 % interval over seeds]; "
           "*holds*: the interval lies on the paper's side of 0.", ""]
    if s["seeds"]:
        counts = [c["sampled"] for c in s["wrong_answers"].values()]
        found = f" ({min(counts):,} to {max(counts):,} of {plan['world']['preferences']:,} " \
                "questions)" if counts else ""
        out += [f"{s['seeds']} seeds, {s['hours_of_one_core']} hours of runs, each on one core. "
                f"Rejected answers: the stage-1 model's own wrong ones{found}; {plan['pairs']:,} "
                f"pairs, {plan['passes']} passes. Learning rates by validation: "
                f"SFT {s['chosen']['sft']:g}, DPO {s['chosen']['dpo']:g} (the paper's: 5e-6 and "
                f"1e-6; the grid: {plan['rates'][0]:g} to {plan['rates'][-1]:g})."
                + "".join(f" **{m.upper()}'s is at the edge of the grid**: a better one may lie "
                          "outside." for m in s["edge"]), ""]
    else:
        out += ["**The full study has not been run yet.**", ""]
    out += [f"With 5 seeds the smallest difference it can see (4 times in 5, where a tenth of the "
            f"answers differ) is {effect['group']:.1f} points in a group, {effect['average']:.1f} "
            f"on average, {effect['linear']:.1f} in the linear probe; luck of training adds to it.",
            "", "| the paper's finding | paper | here | |", "|---|---|---|---|"]
    out += [f"| {f['finding']} | {f['paper']} | {show(f)} | {f['verdict']} |"
            for f in s["findings"]]
    if any(s["untuned"].values()):
        out += ["", f"DPO minus SFT on the seeds from {plan['tuning_seeds']} on, which chose no "
                "rate: " + ", ".join(f"{k} {show(c)}" for k, c in s["untuned"].items()) + "."]
    if any(e["sft"] for e in s["each_minus_stage1"]):
        out += ["", "Each minus stage 1 (of a re-paired encoder: minus the original):", "",
                "| | stage 1 | SFT | DPO |", "|---|---|---|---|"]
        out += [f"| {e['measure']} | {show(e['stage1'], '')} | {show(e['sft'])} | "
                f"{show(e['dpo'])} |" for e in s["each_minus_stage1"] if e["stage1"]]
    if any(c["linear"] for c in s["controls"][2:]):
        out += ["", "Is it the contrast, or the rejected text? In all rows but the easy ones the "
                "items are the same; points above stage 1, of a re-paired encoder above the "
                "original:", "",
                "| trained with | model, average | linear | segmentation | re-paired, average |",
                "|---|---|---|---|---|"]
        out += [f"| {c['trained']} | " + " | ".join(show(c[m]) for m in (
            "vqa average", "linear", "seg", "repair average")) + " |" for c in s["controls"]]
    figures = [f"![{alt}](results/{name}.png)" for name, alt, _ in FIGURES if drawn(s, name)]
    return "\n".join(out + ([""] + figures if figures else [])) + "\n"


# ------------------------------------------------------------------------------------ the figures

def bars(axis, labels, groups):
    """Grouped bars with intervals; groups: {legend: [cell or None, …]}."""
    for i, (name, cells) in enumerate(groups.items()):
        at = [x + i * 0.8 / len(groups) for x in range(len(labels))]
        axis.bar(at, [c["mean"] if c else 0 for c in cells], 0.8 / len(groups), label=name,
                 yerr=[(c["half"] or 0) if c else 0 for c in cells], capsize=2)
    axis.set_xticks([x + 0.4 - 0.4 / len(groups) for x in range(len(labels))], labels)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.legend()


def lines(axis, groups):
    """Curves with intervals over a logarithmic axis; groups: {legend: [(x, cell), …]}."""
    for name, points in groups.items():
        points = [(x, c) for x, c in points if c and c["mean"] is not None]
        axis.errorbar([x for x, _ in points], [c["mean"] for _, c in points],
                      yerr=[c["half"] or 0 for _, c in points], marker="o", capsize=2, label=name)
    axis.set_xscale("log")
    axis.legend()


def draw_lr(axis, s):
    """The paper's App. B.2."""
    lines(axis, {m.upper(): [(r["rate"], r) for r in rates] for m, rates in s["rates"].items()})
    axis.set_xlabel("learning rate")
    axis.set_ylabel("validation average, %")


def draw_each(axis, s, wanted):
    """The rows of "each minus stage 1" that say `wanted`, SFT beside DPO, in points."""
    rows = [e for e in s["each_minus_stage1"] if wanted in e["measure"] and e["sft"]]
    labels = [e["measure"].split(", ")[-1].split(" (")[0] for e in rows]
    bars(axis, labels, {m.upper(): [e[m] for e in rows] for m in ("sft", "dpo")})
    axis.set_ylabel("points above " + ("stage 1" if wanted == "the model" else "the original"))


def draw_eye(axis, s):
    """The same for the three probes of the detached encoder."""
    rows = [e for e in s["each_minus_stage1"] if "," not in e["measure"] and e["sft"]]
    bars(axis, [e["measure"] for e in rows], {m.upper(): [e[m] for e in rows]
                                              for m in ("sft", "dpo")})
    axis.set_ylabel("points above stage 1's encoder")


def draw_size(axis, s):
    """DPO minus SFT by number of pairs (the paper's data-size figure, as a difference)."""
    rows = [f for f in s["findings"] if f["part"] == "size" and "pairs: " in f["finding"]
            and "mean" in f]
    lines(axis, {"DPO − SFT": [(int(f["finding"].split()[0].replace(",", "")), f) for f in rows]})
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("pairs")
    axis.set_ylabel("points, the model's average")


def draw_controls(axis, s):
    """Every kind of pair, in points above stage 1."""
    names = {"vqa average": "the model", "linear": "linear probe", "seg": "segmentation",
             "repair average": "re-paired"}
    bars(axis, list(names.values()), {c["trained"]: [c[m] for m in names] for c in s["controls"]
                                      if not c["trained"].startswith("*")})
    axis.legend(fontsize=6)
    axis.set_ylabel("points above stage 1")


# name, what a reader who cannot see it is told, the function that draws it
FIGURES = (("lr", "Validation average by learning rate", draw_lr),
           ("vqa", "The trained models by group of benchmarks",
            lambda axis, s: draw_each(axis, s, "the model")),
           ("eye", "Probes of the detached encoder", draw_eye),
           ("repair", "Re-paired encoders by group", lambda a, s: draw_each(a, s, "re-paired")),
           ("size", "DPO minus SFT by number of pairs", draw_size),
           ("controls", "Which part of the signal trains the eye", draw_controls))


def drawn(s, name):
    """Is there something to draw in this figure?"""
    if name == "lr":
        return any(r["mean"] is not None for r in s["rates"]["sft"])
    if name == "controls":
        return any(c["linear"] for c in s["controls"][2:])
    return any(f["part"] == name and "mean" in f for f in s["findings"])


def draw_figures(summary, out):
    """One PNG a figure; needs matplotlib, of the development requirements alone."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed (pip install -r requirements-dev.txt)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for name, title, draw in FIGURES:
        if drawn(summary, name):
            figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
            draw(axis, summary)
            axis.set_title(title, fontsize=10)
            figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)


def put_section(readme, text):
    """The README's text with its study section replaced; raises SystemExit without the marks."""
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"error: README.md has no {BEGIN} … {END} to put the section in")
    return readme[:readme.index(BEGIN) + len(BEGIN)] + "\n" + text + readme[readme.index(END):]


def differing(one, other):
    """Results that both folders hold, and those whose values differ: ([path, …], [path, …]).
    A seed that is run again must give the same to the last bit (on the same kind of processor)."""
    both = sorted(str(p.relative_to(one)) for p in one.glob("*/*.json")
                  if (other / p.relative_to(one)).exists())
    return both, [p for p in both if json.loads((one / p).read_text())["values"]
                  != json.loads((other / p).read_text())["values"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results, and "
                        "where summary.json, summary.md and the figures go (default results)")
    parser.add_argument("--no-readme", action="store_true", help="leave README.md as it is; only "
                        "--out results changes it in any case")
    parser.add_argument("--quick", action="store_true", help="the sizes of study.py --quick; "
                        "README.md stays as it is")
    parser.add_argument("--against", type=Path, metavar="DIR", help="write nothing; compare with "
                        "the results in DIR, of another call of study.py, value by value")
    args = parser.parse_args()
    if args.against:
        both, apart = differing(args.out, args.against)
        print("\n".join([*(f"differs: {p}" for p in apart),
                         f"{len(both) - len(apart)} of {len(both)} results are the same"]))
        raise SystemExit(1 if apart or not both else 0)
    plan = QUICK if args.quick else FULL
    summary = summarise(Results(args.out), plan)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "summary.json", summary)
    text = section(summary, plan)
    (args.out / "summary.md").write_text(text)
    draw_figures(summary, args.out)
    if args.out == Path("results") and not (args.quick or args.no_readme):
        aside = Path("README.md.tmp")
        aside.write_text(put_section(Path("README.md").read_text(encoding="utf-8"), text))
        os.replace(aside, "README.md")
    verdicts = [f["verdict"] for f in summary["findings"]]
    print(f"wrote {args.out}/summary.json, summary.md: of {len(verdicts)} findings "
          + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)))


if __name__ == "__main__":
    main()
