"""What is shown of scores: one table, differences with intervals, the paper's rows, wrong answers.

Of a score the normal approximation over units (score.py). Of a difference between two models: a
bootstrap paired by unit, within strata; of a group or the average, of the mean of its benchmarks,
each resampled by itself, with a seed of its own name.
"""
import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from judge import answer, intervals, score
from pivot import checkpoints, files, images, printing, records

# The paper's table of frozen encoders + Qwen2.5-1.5B: average | General | OCR & Chart |
# Vision-Centric | Knowledge.
PAPER = {name.strip(): tuple(map(float, figures.split())) for name, figures in (
    line.rsplit("|", 1) for line in """\
SigLIP1-So400m          | 50.9 65.4 42.3 49.8 46.0
SigLIP1-So400m + SFT    | 52.2 66.5 45.2 50.8 46.3
SigLIP1-So400m + PIVOT  | 53.2 67.7 46.8 51.7 46.6
SigLIP2-So400m          | 52.4 66.2 46.6 50.6 46.1
SigLIP2-So400m + SFT    | 54.6 66.9 52.2 51.7 47.7
SigLIP2-So400m + PIVOT  | 55.6 68.1 53.9 52.4 48.1
SigLIP2-giant           | 53.9 66.5 50.8 51.9 46.4
SigLIP2-giant + SFT     | 55.4 67.4 52.8 53.1 48.5
SigLIP2-giant + PIVOT   | 56.7 68.5 54.7 54.2 49.3
CLIP-large              | 46.3 62.1 35.1 43.0 45.0
CLIP-large + PIVOT      | 49.5 64.6 37.8 48.6 47.1
DINOv2-giant            | 40.9 58.4 17.6 45.1 42.6
DINOv2-giant + PIVOT    | 43.6 62.1 18.7 49.2 44.3
MAE-huge                | 36.8 47.6 17.3 40.2 42.0
MAE-huge + PIVOT        | 39.7 52.5 18.2 43.3 44.6
MoCo-base               | 35.3 42.5 17.1 39.6 42.1
MoCo-base + PIVOT       | 37.5 47.4 17.6 41.0 44.1
ImageNet-Sup huge       | 35.5 44.6 17.2 38.2 42.1
ImageNet-Sup huge+PIVOT | 37.7 47.3 18.1 40.3 45.1""".splitlines())}
PAPER_TWO = "SigLIP1-So400m + ConvNeXt-XXL, averages alone: 51.4; with PIVOT on SigLIP1: 53.6"
PAPER_ORDER = ("General", "OCR & Chart", "Vision-Centric", "Knowledge")


def means_of(results):
    """The mean of each group, and of all: {"General": 50.0, …, "Average": 50.0}."""
    return {**results["groups"], "Average": results["average"]}


def rows_of(columns, cells):
    """Rows in the order of the table: each group, its benchmarks, the average. cells(name,
    benchmarks below it) → what stands beside the name."""
    names = [n for n in score.BENCHES if any(n in r["benchmarks"] for r in columns.values())]
    rows = []
    for group in score.GROUPS:
        inside = [n for n in names if score.BENCHES[n].group == group]
        rows += [[group, *cells(group, inside)]] if inside else []
        rows += [[f"  {name}", *cells(name, [name])] for name in inside]
    return rows + [["Average", *cells("Average", names)]]


def table(columns):
    """{model: results} → the lines of one table, benchmarks × models: score ± the half-width of its
    interval, n questions, and the score of always giving the most frequent answer."""
    def cell(value, interval=None):
        return "–" if value is None else f"{value:.1f}" + (f" ±{interval:.1f}" if interval else "")

    def cells(name, _):
        if name not in score.BENCHES:
            return ["", ""] + [cell(means_of(r).get(name)) for r in columns.values()]
        found = [r["benchmarks"].get(name, {}) for r in columns.values()]
        some = next(c for c in found if c)
        return [str(some["n"]), cell(some["chance"])] + [cell(c.get("score"), c.get("ci95"))
                                                         for c in found]
    out = printing.table([["", "n", "chance", *columns], *rows_of(columns, cells)])
    for name, r in columns.items():
        if r.get("missing"):
            out.append(f"{name}: not scored and left out of the means: {', '.join(r['missing'])}")
        if r.get("limit"):
            out.append(f"{name}: only the first {r['limit']} questions of each file")
    if len({frozenset(r["benchmarks"]) for r in columns.values()}) > 1:
        out.append("Means are over different benchmarks: do not compare them.")
    return out


def changes(columns, units):
    """{model: results}, {model: {bench: units}} → rows [what, one of each model but the first]:
    (difference to the first, low, high), None where the two did not answer the same questions of
    the same file."""
    first, *others = columns
    found = {}                                   # (model, bench) → difference, bootstrap draws
    for name in others:
        for bench in units[name].keys() & units[first].keys():
            if columns[name].get(f"{bench}.tsv") != columns[first].get(f"{bench}.tsv"):
                continue
            change = score.unit_differences(units[name][bench], units[first][bench])
            if change is not None:
                scores = [columns[n]["benchmarks"][bench]["score"] for n in (name, first)]
                found[name, bench] = scores[0] - scores[1], \
                    intervals.stratified_bootstrap(change, bench)

    def cell(name, benches):
        if not all((name, bench) in found for bench in benches):
            return None
        change = np.mean([found[name, bench][0] for bench in benches])
        return change, *intervals.middle_95(np.mean([found[name, b][1] for b in benches], 0))
    return rows_of(columns, lambda _, benches: [cell(name, benches) for name in others])


def differences(columns, units):
    """The same as the rows of a table."""
    first, *others = columns
    return [[f"minus {first}", *others], *(
        [what, *("–" if c is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*c) for c in cells)]
        for what, *cells in changes(columns, units))]


def units_beside(path):
    """The units.json beside a results.json: {bench: [[stratum, unit, value], …]}."""
    return files.read_json(path.with_name("units.json"), remedy="; the command that answered, "
                              "with --rescore, writes it")


def paper_table():
    """The lines of the paper's table, to hold real benchmarks against."""
    return printing.table([["the paper: frozen encoder + Qwen2.5-1.5B", "average", *PAPER_ORDER],
                 *([k, *(f"{x:.1f}" for x in v)] for k, v in PAPER.items())]) + [PAPER_TWO]


def compare(folders, scoring):
    """What --compare prints: one table of models already scored, then differences to the first.
    scoring: the arguments that say how a model is scored, not how it was made."""
    names = [Path(d).name for d in folders]
    names = names if len(set(names)) == len(names) else folders
    found = {name: next((p for p in (Path(d, "bench", "results.json"), Path(d, "results.json"))
                         if p.exists()), None) for name, d in zip(names, folders)}
    lost = [name for name, path in found.items() if path is None]
    if lost:
        raise SystemExit(f"error: not scored yet: {', '.join(lost)}")
    columns = {n: files.read_json(p, "benchmarks", "groups", "average")
               for n, p in found.items()}
    out = table(columns)
    if len(columns) > 1:
        units = {n: units_beside(p) for n, p in found.items()}
        out += ["", *printing.table(differences(columns, units))]
    out += alike({n: p.parent.parent / "config.json" for n, p in found.items()}, scoring)
    if is_paper(columns.values()):
        out += ["", *paper_table()]
    return out


def alike(configs, scoring):
    """A line on whether encoders were re-paired alike: the same LLM, the same data in the same
    order, the same arguments, but for those that name the encoder or say where files are.
    configs: {model: path of its run's config.json}; models that were not re-paired say nothing."""
    free = checkpoints.FREE | scoring | {"encoder", "llm", "image_size", "data", "images",
                                         "captions", "instruct"}
    made = [files.read_json(p, "arguments") for p in configs.values() if p.exists()]
    repaired = [{"LLM": config.get("llm_digest"), "data": config["data_digest"],
                 **{f"--{k.replace('_', '-')}": v for k, v in config["arguments"].items()
                    if k not in free}} for config in made if config.get("stage") == "repair"]
    if len(repaired) < 2:
        return []
    first, *others = repaired
    apart = [what for what in first if any(other.get(what) != first[what] for other in others)]
    if apart:
        return ["", f"NOT a controlled comparison: re-paired with another {' and '.join(apart)}"]
    return ["", f"Re-paired alike: LLM {first['LLM']}, data {' '.join(first['data'])}, "
                f"seed {first['--seed']}"]


def is_paper(results):
    return any(score.BENCHES[b].suite == "paper" for r in results for b in r["benchmarks"])


def text(name, results):
    """report.txt: the table, what is to be known of each score, the prompts, the paper's rows."""
    out = table({name: results})
    notes = [f"  {b}: {r['note']}" for b, r in results["benchmarks"].items() if r["note"]]
    out += ["", "What was scored:", *notes] if notes else []
    out += ["", "The prompt of each benchmark, for its first question (after the image):"]
    for b, r in results["benchmarks"].items():
        out += [f"  {b}", *(f"    | {line}" for line in r["prompt"].splitlines())]
    if is_paper([results]):
        out += ["", *paper_table()]
    return "\n".join(out) + "\n"


# -------------------------------------------------------------------------------- wrong answers

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>Wrong answers</title><style>
body {{ font: 15px/1.4 sans-serif; margin: 2em; max-width: 70em }}
div {{ display: flex; gap: 1em; margin: 1em 0; border-top: 1px solid #ccc; padding-top: 1em }}
img {{ max-width: 20em; max-height: 20em; align-self: start }}
pre {{ white-space: pre-wrap; margin: 0; overflow-wrap: anywhere }} b {{ color: #b00 }}
</style><h1>Wrong answers of {model}</h1>
{body}</html>
"""


def picture_tag(tsv, row):
    """The picture, decoded and written anew as a small JPEG: nothing of the data's own bytes."""
    try:
        pixels = images.load_image(answer.picture_of(tsv, row), None, row["where"])
    except records.BadRecord as e:
        return f"<pre>{html.escape(str(e))}</pre>"
    picture, out = Image.fromarray(pixels.transpose(1, 2, 0)), io.BytesIO()
    picture.thumbnail((480, 480))
    picture.save(out, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}">'


def wrong_page(model, answered, most, ocr_tokens=False):
    """One self-contained HTML page: of each benchmark the first `most` answers not fully right.

    answered: [(tsv, rows, rows whose pictures were shown, {index: prediction}), …]. Everything
    that comes from data is escaped, and the page itself forbids scripts.
    """
    body = []
    for tsv, rows, shown, predictions in answered:
        values = [score.value(tsv.stem, r, predictions[r["index"]]) for r in rows]
        wrong = [i for i, v in enumerate(values) if v < 1]
        body.append(f"<h2>{html.escape(tsv.stem)}: {len(wrong)} of {len(rows)} not fully right"
                    + (f", the first {most}" if len(wrong) > most else "") + "</h2>")
        for i in wrong[:most]:
            row, right = rows[i], score.references(tsv.stem, rows[i])
            gold = right[0] if score.options_of(row) else json.dumps(right, ensure_ascii=False)
            words = [f"index {row['index']}, worth {values[i]:.2f}",
                     score.prompt_of(tsv.stem, row, ocr_tokens), f"right: {gold}"]
            body.append(f"<div>{picture_tag(tsv, shown[i])}<pre>"
                        + "\n\n".join(map(html.escape, words))
                        + f"\n\nsaid: <b>{html.escape(predictions[row['index']])}</b></pre></div>")
    return PAGE.format(model=html.escape(str(model)), body="\n".join(body))
