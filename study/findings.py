"""What counts as a finding of the study: the list, and the statistics that decide.

The unit is the seed. A finding is a difference taken inside each seed (the same world, the same
stage-1 model), its mean over seeds, and Student's 95 % interval: mean ± t · sd / √n. It *holds* if
the interval lies wholly on the paper's side of 0, *does not* if wholly on the other, else it is
*undecided*. A tie holds if the whole interval lies within ±TIE points, and does not if it excludes
0 and is not within. With fewer seeds than are registered nothing is decided. The list was fixed
before any test split was read, and is never shortened: what was not run says so.
"""
import json
import re
from pathlib import Path

from judge.intervals import T975, student

# Student's t for 1 to 4 degrees of freedom (five seeds are registered): 80 % quantile.
T80 = (1.376, 1.061, 0.978, 0.941)
TIE = 2.0                                  # points within which two scores count as equal
GROUPS = ("General", "Knowledge", "OCR & Chart", "Vision-Centric")


# ------------------------------------------------------------------------------------ statistics

def verdict(values, side):
    """ "holds", "does not" or "undecided"; side: the paper's, "+" or "=" (a tie within TIE)."""
    middle, half = student(values)
    if half is None:
        return "undecided"
    low, high = middle - half, middle + half
    if side == "=":
        return "holds" if -TIE <= low and high <= TIE else \
            "does not" if low > 0 or high < 0 else "undecided"
    return "holds" if low > 0 else "does not" if high < 0 else "undecided"


def smallest_effect(seeds, questions):
    """The smallest true difference, in points, that `seeds` seeds find 4 times in 5 (at 95 %)
    where two models differ in a tenth of the answers to `questions` questions and in nothing else:
    (t.975 + t.80) √(0.1 / questions / seeds). Training luck comes on top. None for one seed."""
    if seeds < 2:
        return None
    return 100 * (T975[seeds - 2] + T80[seeds - 2]) * (0.1 / questions / seeds) ** 0.5


# -------------------------------------------------------------------------------------- findings

class Results:
    """All values there are: {(part, run without its seed): {seed: {condition: {measure: …}}}}."""

    def __init__(self, out):
        self.out, self.values, self.seconds, self.codes = Path(out), {}, 0.0, set()
        for path in sorted(self.out.glob("*/*.json")):
            found = json.loads(path.read_text())
            self.seconds += found["seconds"]
            self.codes.add(found["code"])
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
        """How many seeds have none of it since a run that these terms need diverged: both methods
        of a folder are judged together, or not at all."""
        seeds = set()
        for _, (_, part, run, _) in terms:
            folder = f"size-{run}" if part == "size" else run or "main"
            for key in ((part, run), ("made", f"{folder}-sft"), ("made", f"{folder}-dpo"),
                        ("made", folder), ("made", "stage1")):
                seeds |= {s for s, v in self.values.get(key, {}).items() if "diverged" in (v or {})}
        return len(seeds)


def home(measure):
    """The part of the main comparison that has a measure."""
    return next((p for p in ("vqa", "repair") if measure.startswith(p)), "eye")


def minus(measure, a, b):
    """The terms of a difference: measure of a minus that of b; each a condition of the main
    comparison, or (part, run, condition)."""
    return [(sign, (measure, *((home(measure), "", x) if isinstance(x, str) else x)))
            for sign, x in ((1, a), (-1, b))]


def findings(sizes):
    """[(part, the paper's finding, its number, side, terms), …] in the order of the README.

    The numbers are from the paper's tables (So400m with a 1.5B head, where it gives that one);
    the sizes stand in its proportions 3 : 5 : 10 : 20 : 40."""
    numbers = sorted([*sizes["sizes"], sizes["pairs"]])

    def at_size(n, condition):
        return condition if n == sizes["pairs"] else ("size", str(n), condition)
    out = [("vqa", "the model, average: DPO above SFT", "+1.9", "+",
            minus("vqa average", "dpo", "sft"))]
    out += [("vqa", f"the model, {g}: " + ("a tie" if g == "Knowledge" else "DPO above SFT"),
             "0" if g == "Knowledge" else "above 0", "=" if g == "Knowledge" else "+",
             minus(f"vqa {g}", "dpo", "sft")) for g in GROUPS]
    out += [("eye", text, p, "+", minus(measure, "dpo", "sft")) for text, p, measure in (
        ("linear probe of the encoder: DPO above SFT", "+1.8", "linear"),
        ("segmentation probe: DPO above SFT", "+0.6 to +1.2", "seg"),
        ("at stage 1, DPO's loss looks at the object more than SFT's", "pictures", "heat"),
        ("alignment with a language model (× 100): DPO above SFT", "above 0", "align"))]
    out += [("repair", f"re-paired, average: {a} above {b}", p, "+",
             minus("repair average", x, y)) for a, x, b, y, p in
            (("DPO", "dpo", "the original", "original", "+3.2"),
             ("SFT", "sft", "the original", "original", "+2.2"),
             ("DPO", "dpo", "SFT", "sft", "+1.0"))]
    out += [("repair", f"re-paired, {g}: DPO above SFT", p, "+",
             minus(f"repair {g}", "dpo", "sft")) for g, p in
            zip(GROUPS, ("+1.2", "+0.4", "+1.7", "+0.7"))]
    gaps = [minus("vqa average", at_size(n, "dpo"), at_size(n, "sft")) for n in numbers]
    out += [("size", f"{n:,} pairs: DPO above SFT", p, "+", gap) for n, gap, p in
            zip(numbers, gaps, ("+4.0", "+3.0", "+1.9", "+1.9", "+1.8"))]
    out += [("size", "the gap is larger with the fewest pairs than with the most", "+2.2", "+",
             gaps[0] + [(-sign, what) for sign, what in gaps[-1]]),
            ("size", "DPO on the fewest pairs above SFT on the most", "+0.9", "+",
             minus("vqa average", at_size(numbers[0], "dpo"), at_size(numbers[-1], "sft")))]
    large = {c: ("head", "head-l", c) for c in ("sft", "dpo")}
    out += [("head", "DPO's encoder, linear probe: better through the larger head", "+4.4", "+",
             minus("linear", large["dpo"], "dpo")),
            ("head", "DPO's encoder, re-paired: better through the larger head", "above 0", "+",
             minus("repair average", large["dpo"], "dpo")),
            ("head", "larger head, the model: DPO above SFT", "+2.7", "+",
             minus("vqa average", large["dpo"], large["sft"]))]
    larger = {c: ("encoder", "eye-l", c) for c in ("original", "sft", "dpo")}
    out += [("encoder", "larger encoder, the model: DPO above SFT", "+1.9", "+",
             minus("vqa average", larger["dpo"], larger["sft"])),
            ("encoder", "larger encoder, re-paired: DPO above the original", "+2.8", "+",
             minus("repair average", larger["dpo"], larger["original"])),
            ("encoder", "re-paired: the smaller encoder after DPO above the larger original",
             "+1.7", "+", minus("repair average", "dpo", larger["original"]))]
    for name, label, p in (("supervised", "class labels", "+2.2"), ("masked", "masking", "+2.9")):
        e = {c: ("pretrained", name, c) for c in ("original", "sft", "dpo")}
        out += [("pretrained", f"pretrained by {label}, re-paired: DPO above the original", p, "+",
                 minus("repair average", e["dpo"], e["original"])),
                ("pretrained", f"pretrained by {label}, re-paired: DPO above SFT", "not given", "+",
                 minus("repair average", e["dpo"], e["sft"]))]
    return out


def measures():
    """[(label, measure)] of all that is compared with stage 1, in the order of the README."""
    return [*((f"the model, {g}", f"vqa {g}") for g in (*GROUPS, "average")),
            ("linear probe", "linear"), ("segmentation", "seg"), ("alignment × 100", "align"),
            *((f"re-paired, {g}", f"repair {g}") for g in (*GROUPS, "average"))]


def control(kind, condition):
    """Where a kind of pairs keeps a condition's values: "" is the main comparison."""
    return ("controls", kind, condition) if kind else condition


# What of the signal trains the encoder: label, (kind of pairs, condition), what it is compared
# with.
OWN, STAGE1, SFT_EASY = ("", "dpo"), ("", "stage1"), ("easy", "sft")
CONTROLS = (
    ("SFT, no rejected answer", ("", "sft"), STAGE1),
    ("DPO, the model's own wrong answer", OWN, STAGE1),
    ("DPO, one attribute swapped", ("swapped", "dpo"), STAGE1),
    ("DPO, the right answer to another question", ("shuffled", "dpo"), STAGE1),
    ("DPO, the model's wrong answer, another image", ("images", "dpo"), STAGE1),
    ("SFT, easy items", SFT_EASY, STAGE1),
    ("DPO, easy items, one attribute swapped", ("easy", "dpo"), STAGE1),
    ("*DPO, own wrong answer, minus* one attribute swapped", OWN, ("swapped", "dpo")),
    ("*DPO, own wrong answer, minus* another question's", OWN, ("shuffled", "dpo")),
    ("*DPO, own wrong answer, minus* another image", OWN, ("images", "dpo")),
    ("*DPO, own wrong answer, minus* SFT, easy items", OWN, SFT_EASY),
    ("*DPO, easy items, minus* SFT, easy items", ("easy", "dpo"), SFT_EASY))
