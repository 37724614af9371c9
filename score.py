"""Benchmarks: how a file is read, how an answer is scored, how scores are averaged.

BENCHES names each benchmark's group, rule and prompt suffix. A file is recognised by its name.
"""
import base64
import csv
import re
from collections import Counter, defaultdict
from typing import NamedTuple

LETTER = "Answer with the option's letter from the given choices directly."
GROUPS = ("General", "Knowledge", "OCR & Chart", "Vision-Centric")


class Bench(NamedTuple):
    group: str
    suffix: str      # of open questions; questions with options always end in LETTER


BENCHES = {
    "ToyGeneral": Bench("General", ""),
    "ToyKnowledge": Bench("Knowledge", ""),
    "ToyOCR": Bench("OCR & Chart", ""),
    "ToyVision": Bench("Vision-Centric", ""),
    "EasyVQA": Bench("General", ""),
}


def read_tsv(path):
    """Yield the rows of a VLMEvalKit TSV as dicts, `image` resolved to bytes; raises SystemExit.

    An `image` of at most 64 characters is the index of an earlier row whose image is reused.
    """
    csv.field_size_limit(2 ** 31 - 1)
    images, seen, number = {}, set(), 1
    with open(path, newline="", encoding="utf-8") as f:
        lines = csv.DictReader(f, delimiter="\t")
        while True:
            try:
                row, number = next(lines), number + 1
            except StopIteration:
                break
            except (UnicodeDecodeError, csv.Error) as e:
                raise SystemExit(f"error: {path}:{number + 1}: not a TSV in UTF-8 ({e})")
            missing = [c for c in ("index", "question", "answer", "image") if not row.get(c)]
            if missing:
                raise SystemExit(f"error: {path}:{number}: no '{missing[0]}'")
            if row["index"] in seen:
                raise SystemExit(f"error: {path}:{number}: index {row['index']} is an earlier "
                                 f"row's, too")
            seen.add(row["index"])
            if len(row["image"]) > 64:
                images[row["index"]] = row["image"]
            elif row["image"] not in images:
                raise SystemExit(f"error: {path}:{number}: image {row['image']!r} is neither "
                                 f"base64 nor the index of an earlier row")
            else:
                row["image"] = images[row["image"]]
            try:
                row["image"] = base64.b64decode(row["image"], validate=True)
            except ValueError:
                raise SystemExit(f"error: {path}:{number}: 'image' is not base64")
            row["where"] = f"{path}:{number}"
            yield row
    if number == 1:
        raise SystemExit(f"error: {path}: no question in it")


def options_of(row):
    """The choice columns of a TSV row that hold something: {"A": text, …}."""
    return {c: row[c] for c in "ABCDEFGH" if (row.get(c) or "").strip()}


def prompt_of(row, bench):
    """The one fixed prompt of a benchmark: hint, question, options, suffix."""
    hint, options = (row.get("hint") or "").strip(), options_of(row)
    lines = [hint] if hint else []
    lines += [row["question"].strip()] + [f"{k}. {v}" for k, v in options.items()]
    suffix = LETTER if options else bench.suffix
    return "\n".join(lines + ([suffix] if suffix else []))


def exact(prediction, answer):
    """Equal after lower-casing and dropping surrounding space and a final full stop."""
    return prediction.strip().lower().rstrip(".") == answer.strip().lower().rstrip(".")


def letter(prediction, answer, options):
    """Cambrian's letter rule, then option text. "B", "(b)", "Answer: B." and "B. cat" are B.

    options: {"A": text, …}. The text after the last "answer is" / "answer:" counts; a first
    character that ends there or at a stop is the letter; else one option text contained decides.
    """
    text = re.split(r"answer is|answer:", prediction.lower())[-1].strip()
    text = text.strip(" .()\n")
    match = re.match(r"([a-h])(?:$|[.,:)])", text)
    if match:
        return match[1] == answer.strip().lower()
    named = [k for k, v in options.items() if v.strip().lower() == text] or \
        [k for k, v in options.items() if v.strip().lower() in text]
    return len(named) == 1 and named[0].lower() == answer.strip().lower()


def score_row(row, prediction):
    """Is this prediction right? row: a TSV row with `answer` and perhaps options."""
    options = options_of(row)
    return letter(prediction, row["answer"], options) if options \
        else exact(prediction, row["answer"])


def chance(rows):
    """Accuracy, in percent, of always giving the most frequent answer of each question type."""
    answers = defaultdict(Counter)
    for row in rows:
        answers[row.get("category"), bool(options_of(row))][row["answer"].strip().lower()] += 1
    return 100 * sum(max(c.values()) for c in answers.values()) / len(rows)


def summarise(scores):
    """{bench: {"score", …}} → group means and the average over benchmarks, missing ones left out.

    The average of all is the plain mean over benchmarks (= mean of group means, when all are in).
    """
    groups = {}
    for group in GROUPS:
        inside = [s["score"] for name, s in scores.items() if BENCHES[name].group == group]
        if inside:
            groups[group] = sum(inside) / len(inside)
    return {"groups": groups, "average": sum(s["score"] for s in scores.values()) / len(scores)}


def table(columns):
    """{model name: results} → the lines of one table, benchmarks × models: score ± the half-width
    of its 95 % interval (binomial), with the chance level beside it."""
    names = [n for n in BENCHES if any(n in r["benchmarks"] for r in columns.values())]
    width = max(16, *(len(c) + 2 for c in columns))
    lines = [f"{'':<16}{'n':>6}{'chance':>9}" + "".join(f"{c:>{width}}" for c in columns)]

    def row(label, n, base, values):
        lines.append(f"{label:<16}{n:>6}{base:>9}" + "".join(f"{v:>{width}}" for v in values))

    def cell(value, interval=None):
        return "–" if value is None else f"{value:.1f}" + (f" ±{interval:.1f}" if interval else "")
    for group in GROUPS:
        inside = [n for n in names if BENCHES[n].group == group]
        if not inside:
            continue
        row(group, "", "", [cell(r["groups"].get(group)) for r in columns.values()])
        for name in inside:
            cells = [r["benchmarks"].get(name, {}) for r in columns.values()]
            some = next(c for c in cells if c)
            row(f"  {name}", some["n"], f"{some['chance']:.1f}",
                [cell(c.get("score"), c.get("ci95")) for c in cells])
    row("Average", "", "", [cell(r["average"]) for r in columns.values()])
    return lines
