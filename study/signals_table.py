"""OUT/*/*.json of the six signals → one table of models, encoders and costs, and what it decides.
Of the arms that draw answers also what these were worth while it trained, as curves.

    python -m study.signals_table                          # of runs/signals/results
    python -m study.signals_table --out runs/signals-quick/results --quick

Writes OUT/signals.md and prints it; OUT/curves.jsonl, a line a run that is there (runs may be
deleted then); OUT/curves.png. signals.md beside this file fixed what is compared.
"""
import argparse
import json
from pathlib import Path

from judge.intervals import student
from pivot import files
from study.findings import Results, verdict
from study.plan import agree, mean
from study.report import show, table
from study.signals import ARMS, FULL, QUICK, VISUAL, lines_of

# What is shown, and by which name results have it: models, then encoders.
MEASURES = {"Knowledge": "vqa Knowledge", **{group: f"vqa {group}" for group in VISUAL},
            "visual": "vqa visual", "held-out reward": "held-out", "linear": "linear",
            "segmentation": "seg", "alignment × 100": "align", "re-paired": "repair average"}
COSTS = {"tokens drawn": "generated", "tokens trained": "trained", "encoder forward": "forward",
         "encoder backward": "backward", "seconds": "seconds"}
AIM = 5                               # points of held-out reward that GRPO shall add to stage 1
# Decided beforehand: the first minus the second, in each of the measures.
COMPARED = (("dpo", "sft"), ("mpo", "dpo"), ("grpo", "sft"), ("grpo", "sft-own"),
            ("grpo", "dpo-own"), ("ppo", "grpo"), ("sft-own", "sft"), ("dpo-own", "dpo"))
EVERY = 10                            # steps to a point of a curve
DECIDING = ("visual", "linear", "segmentation", "alignment × 100", "re-paired")


def cell(values):
    """A value a seed → what report.show shows; None where there is none."""
    if not values:
        return None
    middle, half = student(values)
    return {"mean": middle, "half": half, "n": len(values)}


def where(arm):
    """(part, run, condition) of an arm's result."""
    return ("controls" if arm in ("grpo-random", "grpo-blank") else "signals"), arm, arm


def apart(results, measure, one, other):
    """The first minus the second inside each seed that has both: [value, …]."""
    return results.combined([(1, (measure, *where(one))), (-1, (measure, *where(other)))])


def costs(out):
    """{arm: {cost: mean over seeds}}. An arm of own answers pays for drawing them, too."""
    found = {}
    for path in sorted((out / "made").glob("seed-*.json")):
        _, seed, arm = path.stem.split("-", 2)
        note = json.loads(path.read_text())
        if arm in ARMS and "generated" in (note["values"] or {}):
            cost = {**note["values"], "seconds": note["seconds"]}
            if ARMS[arm].own:
                drawn = json.loads((out / "made" / f"seed-{seed}-own.json").read_text())
                cost["generated"] += drawn["values"]["tokens"]
                cost["forward"] += drawn["values"]["questions"] + drawn["values"]["pairs"]
                cost["seconds"] += drawn["seconds"]
            found.setdefault(arm, []).append(cost)
    return {arm: {key: mean([c[key] for c in each]) for key in COSTS.values()}
            for arm, each in found.items()}


def require_same(results):
    """Refuse arms of one seed that did not see the same items, or encoders that were re-paired from
    different starts; raises SystemExit."""
    items, starts = {}, {}
    for arm, how in ARMS.items():
        for seed, values in results.values.get(("made", arm), {}).items():
            kind = "own answers" if how.own else "pairs"
            items.setdefault(f"seed {seed}: data_digest of the {kind}", {})[arm] = values.get(
                "data_digest")
    for arm in ("original", "stage1", *ARMS):
        part, run, condition = where(arm)
        for seed, values in results.values.get((part, run), {}).items():
            starts.setdefault(f"seed {seed}: what encoders are re-paired from", {})[arm] = \
                values.get(condition, {}).get("start")
    for what, found in (items | starts).items():
        agree(what, {arm: value for arm, value in found.items() if value})      # None: it diverged


def said(values, seeds):
    """Above, below or undecided; with fewer seeds than are registered nothing is decided."""
    if len(values) < seeds:
        return f"{len(values)} of {seeds} seeds"
    return {"holds": "above", "does not": "below"}.get(verdict(values, "+"), "undecided")


def short(number):
    """1234567 → 1.23M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def main_table(results, out):
    """A line an arm: of stage 1 the values, of all others what they are above it."""
    spent, rows = costs(out), []
    for arm, words in (("original", "encoder before stage 1"), ("stage1", "**stage 1**"),
                       *((name, how.words) for name, how in ARMS.items())):
        row = [words]
        for measure in MEASURES.values():
            if arm == "stage1":
                row.append(show(cell(results.combined([(1, (measure, *where(arm)))])), ""))
            else:
                row.append(show(cell(apart(results, measure, arm, "stage1"))))
        row += [short(spent[arm][key]) if arm in spent else "–" for key in COSTS.values()]
        if set(row[1:]) != {"–"}:
            rows.append(row)
    return table(" | ".join(["", *MEASURES, *COSTS]), rows)


def aims(results, seeds):
    """What GRPO and its control by a coin were to reach: lines."""
    grpo, coin = (apart(results, "held-out", arm, "stage1") for arm in ("grpo", "grpo-random"))
    reached, none = said(grpo, seeds), said(coin, seeds)
    if reached == "above":
        reached = "reached" if mean(grpo) >= AIM else f"above, but by less than {AIM}"
    if none in ("below", "undecided"):
        none = "none, as it should be"
    return table("aim | held-out reward above stage 1 | verdict", [
        [f"GRPO: {AIM} points or more", show(cell(grpo)), reached],
        ["a coin as reward: none", show(cell(coin)), none]])


def comparisons(results, seeds):
    """Each pair of COMPARED in each measure: lines."""
    rows = []
    for one, other in COMPARED:
        for label in DECIDING:
            values = apart(results, MEASURES[label], one, other)
            rows.append([f"{ARMS[one].words} minus {ARMS[other].words}", label, show(cell(values)),
                         said(values, seeds)])
    return table("difference | measure | points | verdict", rows)


def chosen(results, sizes):
    """The learning rates, and stage 1 on validation questions: lines."""
    rates = {run.removeprefix("chosen-"): values[0][run.removeprefix("chosen-")]["rate"]
             for (part, run), values in results.values.items()
             if part == "lr" and run.startswith("chosen-")}
    edge = [f"{stage.upper()}'s is at the edge of the grid" for stage, rate in rates.items()
            if len(sizes["rates"]) > 1 and rate in (sizes["rates"][0], sizes["rates"][-1])]
    level = []
    for group in VISUAL:
        values = results.combined([(1, (f"vqa {group}", "lr", "stage1", "stage1"))])
        level.append(f"{group} {show(cell(values), '')}")
    return ["Learning rates: " + ", ".join(f"{stage.upper()} {rate:g}"
                                           for stage, rate in sorted(rates.items()))
            + "".join(f"; **{text}**" for text in edge) + ".", "",
            f"Stage 1 on validation questions (60 to 80 wanted): {', '.join(level)}.", ""]


def page(results, sizes):
    """The whole of OUT/signals.md."""
    require_same(results)
    seeds, codes = len(results.values.get(("signals", "stage1"), {})), len(results.codes)
    return "\n".join([
        "# Six signals from one stage 1", "",
        f"{seeds} of {sizes['seeds']} seeds. Points above stage 1 (of stage 1: percent), mean "
        "[95 % interval over seeds]. *visual* is the mean of the three groups before it; Knowledge "
        "is answered without looking. Costs are means over seeds, of training alone; an arm of own "
        "answers pays for drawing them. Tokens trained count prompt, picture and padding."
        + (f" Made by {codes} states of this code." if codes > 1 else ""), "",
        *main_table(results, results.out), *chosen(results, sizes),
        "The aims:", "", *aims(results, sizes["seeds"]),
        "The comparisons fixed beforehand:", "", *comparisons(results, sizes["seeds"])])


def curves(work, out):
    """What an arm's own draws were worth while it trained, by the rule and before any control: a
    mean over each EVERY steps. {(seed, arm): [mean, …]}, of the runs in WORK and of those that
    OUT/curves.jsonl has kept."""
    kept = out / "curves.jsonl"
    found = {(x["seed"], x["arm"]): x["reward_exact"] for x in
             (lines_of(kept) if kept.exists() else [])}
    for arm, how in ARMS.items():
        for run in sorted(work.glob(f"runs/seed-*/{arm}/{how.stage}")):
            rewards = [x["reward_exact"] for x in lines_of(run / "metrics.jsonl")
                       if "reward_exact" in x]
            if rewards and (run / "final").exists():
                found[int(run.parts[-3][5:]), arm] = [
                    mean(rewards[i:i + EVERY]) for i in range(0, len(rewards), EVERY)]
    found = dict(sorted(found.items()))
    lines = [json.dumps({"seed": seed, "arm": arm, "reward_exact": values}) + "\n"
             for (seed, arm), values in found.items()]
    if lines:
        files.write_text(kept, "".join(lines))
    return found


def draw_curves(found, path):
    """A thin line a seed, a thick one the mean of an arm's; needs matplotlib, of the development
    requirements alone."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed (pip install -r requirements-dev.txt)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    arms = [arm for arm in ARMS if any(arm == of for _, of in found)]
    for color, arm in zip(plt.get_cmap("tab10").colors, arms):
        each = [values for (_, of), values in found.items() if of == arm]
        steps = [EVERY * (i + 0.5) for i in range(len(each[0]))]
        for values in each:
            axis.plot(steps, [100 * v for v in values], color=color, linewidth=0.6, alpha=0.5)
        axis.plot(steps, [100 * mean(v) for v in zip(*each)], color=color, linewidth=2,
                  label=f"{ARMS[arm].words} ({len(each)} seeds)")
    axis.set_xlabel(f"step; a mean over {EVERY}")
    axis.set_ylabel("right answers drawn, %")
    axis.set_title("Answers drawn in training, to questions of the 3,200", fontsize=10)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/signals/results"),
                        help="folder of results (default runs/signals/results)")
    parser.add_argument("--work", type=Path, help="folder of the runs, where it is still there "
                        "(default runs/signals, or runs/signals-quick)")
    parser.add_argument("--quick", action="store_true", help="of `python -m study.signals --quick`")
    args = parser.parse_args()
    if not args.out.is_dir():
        raise SystemExit(f"error: no results at {args.out}; python -m study.signals makes them")
    text = page(Results(args.out), QUICK if args.quick else FULL)
    files.write_text(args.out / "signals.md", text)
    work = args.work or Path("runs/signals-quick" if args.quick else "runs/signals")
    if found := curves(work, args.out):
        draw_curves(found, args.out / "curves.png")
    print(text)
    print(f"wrote {args.out}/signals.md")


if __name__ == "__main__":
    main()
