"""results/*/*.json of the controlled study → its README's section, summary.md with more, figures.

    python -m study.report                       # results/summary.*, its figures, study/README.md
    python -m study.report --out runs/study-quick/results --quick
    python -m study.report --against DIR          # did a seed that was run again give the same?

findings.py says what counts as a finding and which there are.
"""
import argparse
import json
from pathlib import Path

from judge.intervals import student
from pivot import files
from study.findings import (CONTROLS, STAGE1, TIE, Results, control, findings, home, measures,
                            minus, smallest_effect, verdict)
from study.pairs import write
from study.plan import FULL, QUICK

README, BEGIN, END = Path("study/README.md"), "<!-- study -->", "<!-- /study -->"
NAMES = {"original": "original", "stage1": "stage 1", "sft": "SFT", "dpo": "DPO",
         "first": "first time", "dpo-1e-4": "DPO at 1e-4"}
# Folders of OUT with runs made otherwise, and how: shown beside the others, deciding nothing.
BESIDE = {"first": "The *first time*, at the same rates, the processor's instruction set was not "
                   "fixed (now: AVX2, one thread); stage 1 then drew slightly other wrong answers, "
                   "so the pairs differ a little.",
          "dpo-1e-4": "*DPO at 1e-4* is the rate that the second tuning prefers, with all else the "
                      "same (the gradient at stage 1, too)."}
# What the variants' encoders are judged by, and which variants there are: part, run, what it is.
FOUR = {"vqa average": "model, average", "linear": "linear", "seg": "segmentation",
        "repair average": "re-paired, average"}
VARIANTS = (("head", "head-l", "larger head"), ("encoder", "eye-l", "larger encoder"),
            ("pretrained", "supervised", "pretrained by class labels"),
            ("pretrained", "masked", "pretrained by masking"))


def short(rate):
    """0.0001 → 1e-4."""
    return f"{rate:.0e}".replace("e-0", "e-")


def summarise(results, sizes=FULL):
    """Everything the section and the figures show, as one JSON-able dict."""
    def cell(values):
        if not values:
            return None
        middle, half = student(values)
        return {"mean": middle, "half": half, "by_seed": values, "n": len(values)}

    def apart(measure, a, b, first=0, of=None):
        return cell(beside.get(of, results).combined(minus(measure, a, b), first))

    def judged(of, side, terms):
        """Cell and verdict of a finding. All registered seeds decide, or none do."""
        values, lost = of.combined(terms), of.lost(terms)
        said = verdict(values, side) if len(values) == sizes["seeds"] else \
            (f"{len(values)} of {sizes['seeds']} seeds" if values or lost else "not run yet") + \
            (f"; {lost} lost, diverged" if lost else "")
        return {**(cell(values) or {}), "verdict": said}
    beside = {name: Results(results.out / name) for name in BESIDE}
    found = [{"part": part, "finding": text, "paper": paper, "side": side,
              **judged(results, side, terms),
              **{name: judged(other, side, terms) for name, other in beside.items()
                 if other.combined(terms)}}
             for part, text, paper, side, terms in findings(sizes)]
    untuned = {name: apart(m, "dpo", "sft", sizes["tuning_seeds"]) for name, m in (
        ("the model", "vqa average"), ("linear probe", "linear"), ("segmentation", "seg"),
        ("re-paired", "repair average"))}

    def choice(of):
        """→ the rates chosen, and what they say of the finding."""
        rate = {k: v["rate"] for k, v in of.values.get(("lr", "chosen"), {}).get(0, {}).items()}
        return rate, rate and {
            "text": f"{short(rate['dpo'])}, {short(rate['sft'])}",
            "verdict": "holds" if rate["dpo"] < rate["sft"] else
            "does not" if rate["dpo"] > rate["sft"] else "undecided"}
    (rate, said), (earlier, before) = choice(results), choice(beside["first"])
    found.append({"part": "lr", "finding": "best rate (DPO, SFT): DPO's is lower (no interval)",
                  "paper": "1e-6, 5e-6", "verdict": "not run yet", **said,
                  **({"first": before} if before else {})})

    def against(base, others, rows):
        """Of each measure the condition `base` as it is, and the others minus it."""
        return [{"measure": label, base: cell(results.combined([(1, (m, home(m), "", base))])),
                 **{c: apart(m, c, base) for c in others},
                 "dpo-1e-4": apart(m, "dpo", base, of="dpo-1e-4")} for label, m in rows]
    of_encoders = [r for r in measures() if r[1] in ("linear", "seg", "align", "repair average")]
    controls = [{"trained": label, **{m: apart(m, control(*one), control(*base)) for m in FOUR},
                 "held-out": cell([100 * v["heldout_accuracy"] for v in results.values.get(
                     ("made", f"{one[0] or 'main'}-dpo"), {}).values()
                     if "heldout_accuracy" in (v or {})])
                 if one[1] == "dpo" and base == STAGE1 else None}
                for label, one, base in CONTROLS]
    kinds = results.values.get(("made", "pairs"), {})
    rates = {method: [{"rate": r, **(cell(results.combined([(1, (
        "vqa average", "lr", f"{method}-{r:g}", method))])) or {"mean": None})}
                      for r in sizes["rates"]] for method in ("sft", "dpo")}
    return {"seeds": len(results.values.get(("vqa", ""), {})), "findings": found,
            "each_minus_stage1": against("stage1", ("sft", "dpo"), measures()),
            "each_minus_original": against("original", ("stage1", "sft", "dpo"), of_encoders),
            "variants": [{"variant": label, "minus": base, **{
                m: apart(m, (part, run, "dpo"), (part, run, base)) for m in FOUR}}
                for part, run, label in VARIANTS for base in ("sft", "original")],
            "controls": controls, "chosen": earlier or rate, "better": rate,
            "rates": rates, "untuned": untuned,
            "validation_stage1": cell(results.combined([(1, (
                "vqa average", "lr", "stage1", "stage1"))])),
            "edge": [k for k, r in rate.items() if r in (sizes["rates"][0], sizes["rates"][-1])],
            "hours_of_one_core": round(results.seconds / 3600, 1),
            "codes": len(results.codes),
            "wrong_answers": {str(s): v["counts"] for s, v in kinds.items()},
            "blind": cell([100 * v["blind"]["sampled"] for v in kinds.values()]),
            "smallest_effect": {k: smallest_effect(sizes["seeds"], questions) for k, questions in (
                ("group", sizes["world"]["bench"]), ("average", 4 * sizes["world"]["bench"]),
                ("linear", 12 * sizes["world"]["imagenet_val"]))}}


# ------------------------------------------------------------------------------------ the section

def show(cell, sign="+"):
    """A cell as text: its mean and interval in points, or a dash."""
    if not cell or cell.get("mean") is None:
        return (cell or {}).get("text", "–")
    half = cell["half"]
    form = f"{sign}z.{2 if half and half < 0.3 else 1}f"                  # z: no -0.0
    return f"{cell['mean']:{form}}" + ("" if half is None else f" [{cell['mean'] - half:{form}}, "
                                       f"{cell['mean'] + half:{form}}]")


def table(header, rows):
    """The lines of a table in Markdown, and an empty one."""
    return [f"| {header} |", "|---" * (header.count("|") + 1) + "|",
            *(f"| {' | '.join(row)} |" for row in rows), ""]


def section(summary, sizes=FULL):
    """The generated section of study/README.md: what was asked, what came out, what it cannot
    see. Markdown."""
    s, effect = summary, summary["smallest_effect"]
    out = ["`make reproduce` runs the paper's comparison at toy scale, with seeds; "
           "[results/README.md](../results/README.md) fixed its plan, its findings and its "
           "interval before any test split was read. In percentage points, mean [95 % interval "
           "over seeds]; "
           "*holds*: the interval lies on the paper's side of 0; *does not*: wholly on the other; "
           f"else *undecided*. A tie *holds* within ±{TIE}; with fewer than {sizes['seeds']} seeds "
           "nothing is decided.", ""]
    if s["seeds"]:
        counts = [c["sampled"] for c in s["wrong_answers"].values()]
        found = f" ({min(counts):,} to {max(counts):,} of {sizes['world']['preferences']:,} " \
                f"questions; a rule that sees both answers and not the image gets " \
                f"{s['blind']['mean']:.0f} % of these pairs right, chance 50)" if counts else ""
        out += [f"{s['seeds']} seeds, {s['hours_of_one_core']} hours of runs, each on one core. "
                f"Rejected answers: the stage-1 model's own wrong ones{found}; {sizes['pairs']:,} "
                f"pairs, {sizes['passes']} passes. Learning rates by validation: "
                f"SFT {short(s['chosen']['sft'])}, DPO {short(s['chosen']['dpo'])} (the paper's: "
                f"5e-6 and 1e-6; the grid: {short(sizes['rates'][0])} to "
                f"{short(sizes['rates'][-1])})."
                + "".join(f" A second tuning prefers {short(r)} for {m.upper()}; what is shown "
                          "here was trained at the first choice." for m, r in
                          s["better"].items() if r != s["chosen"][m])
                + "".join(f" **{m.upper()}'s is at the edge of the grid**: a better one may lie "
                          "outside." for m in s["edge"])
                + (f" Made by {s['codes']} states of this code." if s["codes"] > 1 else ""), ""]
    else:
        out += ["**The full study has not been run yet.**", ""]
    out += [f"The smallest difference that {sizes['seeds']} seeds find with a power of 80 %, if a "
            f"tenth of the answers differ and training adds no noise of its own (it does): "
            f"{effect['group']:.1f} points in a group, {effect['average']:.1f} on average, "
            f"{effect['linear']:.1f} in the linear probe.", "",
            *table("the paper's finding | paper | here | verdict",
                   [[f["finding"], f["paper"], show(f), f["verdict"]] for f in s["findings"]])]
    out += pictures(s, FIGURES[:1])
    return "\n".join(out).rstrip() + "\n"


def pictures(summary, figures):
    """The lines that show these rows of FIGURES, and an empty one."""
    lines = [f"![{alt}](../results/{name}.png)" for name, alt, *_ in figures
             if drawn(summary, name)]
    return [*lines, ""] if lines else []


def made_otherwise(summary):
    """The findings of the runs in BESIDE, next to the registered ones: lines."""
    again = [f for f in summary["findings"] if f.keys() & BESIDE]
    if not again:
        return []
    names = [name for name in BESIDE if any(name in f for f in again)]
    header, rows = ["the paper's finding", "registered", "verdict"], []
    for name in names:
        header += [NAMES[name], "verdict"]
    for f in again:
        row = [f["finding"], show(f), f["verdict"]]
        for name in names:
            other = f.get(name)
            row += [show(other), other["verdict"] if other else ""]
        rows.append(row)
    return ["The same findings of runs made otherwise, under the same rule; they do not replace "
            f"the registered verdicts. {' '.join(BESIDE[name] for name in names)}", "",
            *table(" | ".join(header), rows)]


def gains(summary, base, text):
    """Every condition minus the condition `base`, measure by measure: lines."""
    rows = [e for e in summary[f"each_minus_{base}"] if e["dpo"]]
    if not rows:
        return []
    shown = [c for c in NAMES if any(e.get(c) for e in rows)]
    cells = [[e["measure"], *(show(e[c], "" if c == base else "+") for c in shown)] for e in rows]
    return [text, "", *table(" | ".join(["", *(NAMES[c] for c in shown)]), cells)]


def details(summary, sizes=FULL):
    """What summary.md has besides the section. Markdown."""
    s, out = summary, made_otherwise(summary)
    if any(s["untuned"].values()):
        untuned = ", ".join(f"{name} {show(c)}" for name, c in s["untuned"].items())
        out += [f"DPO minus SFT on seeds {sizes['tuning_seeds']} to {sizes['seeds'] - 1}, which "
                f"were not used for tuning: {untuned}.", ""]
    out += gains(s, "stage1", "Each minus stage 1 (re-paired: minus stage 1's encoder re-paired):")
    out += gains(s, "original", "The encoder against the one it began as, before stage 1:")

    def named(text, row):
        n = min((row[m]["n"] for m in FOUR if row[m]), default=0)
        return text if n == sizes["seeds"] else f"{text} ({n} of {sizes['seeds']} seeds)"
    if rows := [v for v in s["variants"] if v["linear"]]:
        cells = [[named(v["variant"], v), NAMES[v["minus"]], *(show(v[m]) for m in FOUR)]
                 for v in rows]
        out += ["The variants, of which few comparisons are registered: DPO's model and encoder, "
                "minus SFT's, and its encoder minus the one it began as:", "",
                *table(f"variant | minus | {' | '.join(FOUR.values())}", cells)]
    if any(c["linear"] for c in s["controls"][2:]):
        cells = [[named(c["trained"], c), *(show(c[m]) for m in FOUR), show(c["held-out"], "")]
                 for c in s["controls"]]
        out += ["Is it the contrast, or the rejected text? In all rows but the easy ones the items "
                "are the same; points above stage 1 and, last, the reward accuracy on 600 pairs "
                "never trained on (one attribute swapped, chance 50):", "",
                *table(f"trained with | {' | '.join(FOUR.values())} | held-out pairs", cells)]
    return "\n".join(out + pictures(s, FIGURES[1:]))


def page(summary, sizes=FULL):
    """summary.md: both, with links from where it lies."""
    return f"{section(summary, sizes)}\n{details(summary, sizes)}".replace("](../results/", "](")


# ------------------------------------------------------------------------------------ the figures

def bars(axis, what, labels, groups):
    """Grouped bars of `what`, with intervals, and a dot a seed; groups: {legend: [cell, …]}."""
    wide = 0.8 / len(groups)
    for i, (name, cells) in enumerate(groups.items()):
        at = [x + i * wide for x in range(len(labels))]
        drawn = [(x, c) for x, c in zip(at, cells) if c]
        axis.bar([x for x, _ in drawn], [c["mean"] for _, c in drawn], wide, label=name,
                 yerr=[c["half"] or float("nan") for _, c in drawn], capsize=2, alpha=0.7)
        axis.plot([x for x, c in drawn for _ in c["by_seed"]],
                  [v for _, c in drawn for v in c["by_seed"]], "k.", markersize=3)
    axis.set_xticks([x + 0.4 - wide / 2 for x in range(len(labels))], labels)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_ylabel(what)
    axis.legend()


def draw_lr(axis, s):
    """The paper's App. B.2: means, and a dot a seed (of two an interval would say nothing)."""
    for m, rates in s["rates"].items():
        rates = [r for r in rates if r["mean"] is not None]
        curve, = axis.plot([r["rate"] for r in rates], [r["mean"] for r in rates], label=m.upper())
        axis.plot([r["rate"] for r in rates for _ in r["by_seed"]],
                  [x for r in rates for x in r["by_seed"]], ".", color=curve.get_color())
        axis.plot(*[[r[k] for r in rates if r["rate"] == s["chosen"].get(m)] for k in
                    ("rate", "mean")], "*", markersize=12, color=curve.get_color())
    if s["validation_stage1"]:
        axis.axhline(s["validation_stage1"]["mean"], color="black", linewidth=0.6, linestyle="--",
                     label="stage 1")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate (star: as trained)")
    axis.set_ylabel("validation average, %")
    axis.legend(loc="lower left")


def draw_groups(axis, s):
    """The trained models, SFT beside DPO, by group."""
    rows = [e for e in s["each_minus_stage1"] if "the model" in e["measure"] and e["dpo"]]
    bars(axis, "points above stage 1", [e["measure"].split(", ")[-1] for e in rows],
         {NAMES[c]: [e[c] for e in rows] for c in ("sft", "dpo")})


def draw_encoders(axis, s):
    """The encoders against the one they began as."""
    rows = [e for e in s["each_minus_original"] if e["dpo"]]
    bars(axis, "difference to the original encoder", [e["measure"] for e in rows],
         {NAMES[c]: [e[c] for e in rows] for c in ("stage1", "sft", "dpo")})


def draw_findings(axis, s):
    """DPO minus SFT with its interval, wherever both are compared, beside the paper's number."""
    rows = [f for f in complete(s) if "DPO above SFT" in f["finding"] and f["part"] != "size"][::-1]
    for y, f in enumerate(rows):
        axis.errorbar(f["mean"], y, xerr=f["half"], fmt="ko", markersize=4, capsize=2)
        numbers = f["paper"].replace("+", "").split(" to ")
        if numbers[0].replace(".", "").isdigit():
            axis.plot([float(n) for n in numbers], [y] * len(numbers), "D-", color="tab:orange",
                      markersize=5)
    axis.plot([], [], "ko", label="here, 95 % interval over seeds")
    axis.plot([], [], "D", color="tab:orange", label="the paper")
    axis.set_yticks(range(len(rows)), [f["finding"].replace(": DPO above SFT", "") for f in rows],
                    fontsize=7)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_xlabel("DPO − SFT, points")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2)


def draw_size(axis, s):
    """DPO minus SFT by number of pairs (the paper's data-size figure, as a difference)."""
    rows = [f for f in complete(s) if f["part"] == "size" and "pairs: " in f["finding"]]
    sizes = [f["finding"].split()[0] for f in rows]
    axis.errorbar([int(n.replace(",", "")) for n in sizes], [f["mean"] for f in rows],
                  yerr=[f["half"] or 0 for f in rows], marker="o", capsize=2)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xscale("log")
    axis.set_xticks([int(n.replace(",", "")) for n in sizes], sizes)
    axis.minorticks_off()
    axis.set_xlabel("pairs")
    axis.set_ylabel("DPO − SFT, points of the average")


def draw_controls(axis, s):
    """Every kind of pair, in points above stage 1."""
    bars(axis, "points above stage 1", [x.removesuffix(", average") for x in FOUR.values()], {
        c["trained"]: [c[m] for m in FOUR] for c in s["controls"] if c["trained"][0] != "*"})
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))


# name, what a reader who cannot see it is told, the function that draws it, its height in inches
FIGURES = (("findings", "DPO minus SFT, and what the paper found", draw_findings, 5),
           ("lr", "Validation average by learning rate", draw_lr, 3.6),
           ("groups", "The trained models by group of benchmarks", draw_groups, 3.6),
           ("eye", "The detached encoders, frozen: probes, and under a new LLM", draw_encoders,
            3.6),
           ("size", "DPO minus SFT by number of pairs", draw_size, 3.6),
           ("controls", "Which part of the signal trains the encoder", draw_controls, 3.6))


def complete(s):
    """The findings of which every seed is there: no others are drawn."""
    return [f for f in s["findings"] if f.get("n") == s["seeds"]]


def drawn(s, name):
    """Is there something to draw? ("3,200 pairs" alone, the main comparison, is no figure.)"""
    if name == "lr":
        return any(r["mean"] is not None for r in s["rates"]["sft"])
    if name == "controls":
        return all(c["linear"] and c["linear"]["n"] == s["seeds"] for c in s["controls"])
    part = "vqa" if name in ("findings", "groups") else name
    return sum(f["part"] == part for f in complete(s)) > 1


def draw_figures(summary, out):
    """One PNG a figure; needs matplotlib, of the development requirements alone."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed (pip install -r requirements-dev.txt)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for name, title, draw, height in FIGURES:
        if drawn(summary, name):
            figure, axis = plt.subplots(figsize=(7, height), layout="constrained")
            draw(axis, summary)
            axis.set_title(title, fontsize=10)
            figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)


def put_section(readme, text):
    """The page with its generated section replaced; raises SystemExit without the marks."""
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"error: {README} has no {BEGIN} … {END} to put the section in")
    return readme[:readme.index(BEGIN) + len(BEGIN)] + "\n" + text + readme[readme.index(END):]


def numbers(value, key=""):
    """All numbers of a result: {their path in it: number}."""
    if isinstance(value, dict):
        return {k: n for inner, v in value.items() for k, n in numbers(v, f"{key}/{inner}").items()}
    return {key: value} if isinstance(value, (int, float)) else {}


def differing(one, other):
    """Results that both folders hold, and of those whose values differ the largest difference of
    numbers (0: other words, or a number is missing): ([path, …], {path: number}). A seed that is
    run again, at the same rates, gives the same to the last bit."""
    both, apart = [], {}
    for path in sorted(one.glob("*/*.json")):
        name = str(path.relative_to(one))
        if (other / name).exists():
            both.append(name)
            a, b = (json.loads((out / name).read_text())["values"] for out in (one, other))
            if a != b:
                a, b = numbers(a), numbers(b)
                apart[name] = max((abs(a[k] - b[k]) for k in a.keys() & b.keys()), default=0.0)
    return both, apart


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results, and "
                        "where summary.json, summary.md and the figures go (default results, which "
                        "changes study/README.md, too)")
    parser.add_argument("--quick", action="store_true", help="the sizes of `python -m study "
                        "--quick`; study/README.md stays as it is")
    parser.add_argument("--against", type=Path, metavar="DIR", help="write nothing; compare with "
                        "the results in DIR, of another call of the study, value by value")
    args = parser.parse_args()
    if args.against:
        both, apart = differing(args.out, args.against)
        if not both:
            raise SystemExit(f"error: {args.out} and {args.against} have no result in common")
        print("\n".join([*(f"differs, by at most {most:.4g}: {p}" for p, most in apart.items()),
                         f"{len(both) - len(apart)} of {len(both)} results are the same"]))
        return
    sizes = QUICK if args.quick else FULL
    summary = summarise(Results(args.out), sizes)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "summary.json", summary)
    text = section(summary, sizes)
    (args.out / "summary.md").write_text(page(summary, sizes), encoding="utf-8")
    draw_figures(summary, args.out)
    if args.out == Path("results") and not args.quick:
        files.write_text(README, put_section(README.read_text(encoding="utf-8"), text))
    verdicts = [f["verdict"] for f in summary["findings"]]
    print(f"wrote {args.out}/summary.json, summary.md: of {len(verdicts)} findings "
          + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)))


if __name__ == "__main__":
    main()
