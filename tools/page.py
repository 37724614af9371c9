"""One page a run: look, not read. Curves, scores, pictures and answers in one file for a browser.

    python -m tools.page runs/toy-vit__toy-lm            # writes runs/toy-vit__toy-lm/page.html
    python -m tools.page runs/A runs/B                   # side by side: runs/page.html
    python -m tools.page runs/A --png slides             # the figures alone, as PNG

The page needs nothing beside itself: no script, no font or picture from elsewhere. It can be sent,
printed, read on a telephone, in light and dark. It can be made at any moment: half a run shows
half, and the page names the commands for the rest.

Reads   what the run folders hold: config.json, metrics.jsonl, timing.jsonl of every stage,
        encoder/moved.json, bench/ and repair/*/bench/, probes/; and the benchmark files, for
        questions and pictures. It opens no model.
Writes  runs/NAME/page.html (several runs: page.html beside the first), or --out FILE; with --png
        DIR one PNG a figure (needs matplotlib), and no page.
"""
import re
import time
from pathlib import Path
from shlex import quote

import numpy as np

import repair_eval
from pivot import checkpoints, distributed, files, flags
from tools import evidence, figures, layout, questions
from tools.figures import Chart, Dots, Heat, Line, text
from tools.folder import Run
from tools.layout import embedded, folded, grid, nothing, shown, table

TITLES = {"loss": "Loss", "margin": "Reward margin", "accuracy": "Reward accuracy",
          "rewards": "Rewards (dashed: of rejected answers)", "data_wait":
          "Data wait, % of a step's time", "tokens_per_s": "Tokens a second"}
MODULES = ("encoder", "projector", "llm")
# The last of a run's curves are the rates and the clock's; unknown ones come before them.
ORDER = ["loss", "margin", "accuracy", "rewards", *(f"grad_norm.{x}" for x in MODULES), "?",
         *(f"lr.{x}" for x in MODULES), "data_wait", "tokens_per_s"]
# Arguments that other lines of a stage's card say, or that say where things lie.
ELSEWHERE = checkpoints.FREE | repair_eval.SCORING | {
    "stage", "encoder", "llm", "parent", "data", "images", "captions",
    "instruct", "preferences", "heldout"}


# ------------------------------------------------------------------------------------- the recipe

def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def blocks_of(moved):
    """Of moved.json's entries those of whole blocks."""
    return {name: change for name, change in moved.items()
            if name.split(".")[-1].isdigit() and "downsampling_layer" not in name}


def facts_of(stage):
    """What a stage was made from and how: [(what, said), …]."""
    config, arguments = stage.config, stage.config["arguments"]
    rows = []
    if stage.config.get("parent_digest"):
        rows.append(("from", f"{arguments.get('parent')} {config['parent_digest']}"))
    else:
        rows.append(("encoder", f"{arguments['encoder']} {config.get('encoder_digest', '')}"))
        rows.append(("LLM", f"{arguments['llm']} {config.get('llm_digest', '')}"))
    for what, key in (("data", "data"), ("digest", "data_digest")):
        found = config.get(key) or []
        rows += [(what, x) for x in (found if isinstance(found, list) else [found])]
    rows.append(("settings", ", ".join(
        f"{k.replace('_', ' ')}\u00a0{v}" for k, v in arguments.items()
        if k not in ELSEWHERE and v is not None and v is not False)))
    if stage.steps:
        rows.append(("time", f"{duration(stage.seconds)} for {stage.steps} steps"
                     + (f", peak {stage.peak / 2 ** 30:.2f} GiB" if stage.peak else "")))
    if moved := stage.extracted.get("moved_since_parent"):
        changes = list(blocks_of(moved).values())
        rows.append(("encoder", f"extracted; moved {min(changes):.1e} … {max(changes):.1e} a "
                     "block"))
    versions = config.get("versions", {})
    return [*rows, ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()))]


def card(stage, run, title):
    if stage.done:
        state = '<span class="good">finished</span>'
    else:
        state = f'<span class="bad">not finished: {stage.steps} steps so far</span>'
    facts = "".join(f"<dt>{text(what)}</dt><dd><code>{text(said)}</code></dd>"
                    for what, said in facts_of(stage))
    return f'<div class="card {figures.method(run.method(stage.name))}"><h3>{text(title)}</h3>' \
           f"{state}<dl>{facts}</dl></div>"


def same_items(run):
    """The flags with which a stage goes on from the parent of the others, over the same items in
    the same order; "" where there are no others."""
    others = [s.config["arguments"] for s in run.stages if s.config.get("parent_digest")]
    if not others:
        return ""
    words, first = [], others[0]
    if first["parent"] != "pretrain":
        words += ["--parent", str(files.from_folder(run.folder, first["parent"]))]
    for name in ("preferences", "num_samples", "epochs", "max_steps", "global_batch", "seed"):
        if first.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(first[name])]
    words += [f"--{name.replace('_', '-')}" for name in ("skip_bad", "verifiable")
              if first.get(name)]
    return "".join(f" {quote(word)}" for word in words)


def missing(run):
    """The commands for what a run has not got yet, in the order of the recipe."""
    folder, args = quote(str(run.folder)), {k: quote(str(v)) for k, v in run.arguments.items()}
    common = f"--llm {args['llm']} --data {args['data'] if run.arguments.get('data') else 'DATA'}"
    done = [s.name for s in run.stages if s.done]
    begun = [s.name for s in run.stages if not s.done]
    elsewhere = any(s.config["arguments"].get("parent", "pretrain") not in (None, "pretrain")
                    for s in run.stages)
    scripts = {name: flags.script_of(name) or f"train_{name}.py" for name in begun}
    out = [f"{folder}/{quote(name)} has begun; it goes on by the command that began it: python "
           f"{script} …" for name, script in scripts.items()]
    for name in ("pretrain", "sft", "dpo"):
        if name not in (*done, *begun) and not (name == "pretrain" and elsewhere):
            more = f" --encoder {args['encoder']} {common}" if name == "pretrain" \
                else same_items(run)
            out.append(f"python {flags.script_of(name)} --run-dir {folder}{more}")
    for name in done:
        encoder = run.folder / name / "encoder"
        if name != "pretrain" and not (encoder / "moved.json").exists():
            out.append(f"python extract.py --run-dir {folder} --stage {quote(name)}"
                       + (" --overwrite" if encoder.exists() else ""))
    for name in done:
        if not (run.folder / name / "bench" / "results.json").exists():
            final = quote(f"{run.folder}/{name}/final")
            out.append(f"python repair_eval.py --mllm {final} {common}")
    out += run.evidence.missing if run.evidence else []
    if not (run.folder / "probes" / "gradcam" / "path.json").exists():
        out.append(f"python gradcam.py --run-dir {folder} --path")
    return out


def controlled(run):
    """Did the methods see the same items in the same order, from the same parent? As a line."""
    second = [s for s in run.stages if s.config.get("parent_digest")]
    if len(second) < 2:
        return ""
    apart = [what for what in ("data_digest", "parent_digest")
             if len({str(s.config.get(what)) for s in second}) > 1]
    who = ", ".join(run.label(s.name) for s in second)
    if apart:
        return f'<p class="bad">NOT a controlled comparison: {text(who)} differ in ' \
               f"{text(' and '.join(apart))}</p>"
    return f'<p class="good">{text(who)}: the same items in the same order, from the same ' \
           "parent</p>"


def recipe(runs, args):
    out = []
    for run in runs:
        cards = [card(s, run, "Stage 1" if s.name == "pretrain" else run.label(s.name))
                 for s in run.stages]
        again = [card(s, run, f"Re-paired: {run.label(s.name)}") for s in run.repairs]
        todo = "".join(f"<li><code>{text(line)}</code></li>" for line in missing(run))
        todo = f'<div class="missing">Not there yet:<ul>{todo}</ul></div>' if todo else ""
        out.append(controlled(run) + f'<div class="strip">{"".join(cards + again)}</div>{todo}')
    return out


# ------------------------------------------------------------------------------------- the curves

def title_of(key):
    module = {"llm": "LLM"}.get(key.split(".")[-1], key.split(".")[-1])
    if key.startswith("grad_norm."):
        return f"Gradient norm, {module}"
    if key.startswith("lr."):
        return f"Learning rate, {module}"
    return TITLES.get(key) or key.replace("_", " ").replace(".", ", ")


def charts_of(run, stages):
    """{key: Chart}: every curve that these stages logged, laid over one another."""
    found = {}
    for stage in stages:
        phases = list(dict.fromkeys(phase for _, phase in stage.columns if phase))
        for (key, phase), (x, y) in stage.columns.items():
            name, label = run.method(stage.name), run.label(stage.name)
            dashed = len(phases) > 1 and phase == phases[0]
            label = f"{label}, {phase}" if phase else label
            marks = key.startswith("heldout_")
            if marks:
                key, label = key.removeprefix("heldout_"), f"{label}, held-out"
            if key in ("chosen_reward", "rejected_reward"):
                dashed, key = key == "rejected_reward", "rewards"
                label += ", rejected" if dashed else ", chosen"
            found.setdefault(key, []).append(Line(name, label, x, y, dashed, marks=marks))
    place = {key: i for i, key in enumerate(ORDER)}
    return {key: Chart(key, title_of(key), lines,
                       log=key.startswith("grad_norm") and all(min(x.y) > 0 for x in lines))
            for key, lines in sorted(found.items(), key=lambda c: place.get(c[0], place["?"]))}


def groups_of(run):
    return {"Stage 2: the methods over one another":
            charts_of(run, [s for s in run.stages if s.name != "pretrain"]),
            "Stage 1": charts_of(run, [s for s in run.stages if s.name == "pretrain"]),
            "Re-pairing": charts_of(run, run.repairs)}


def digits(charts):
    rows = [["", "", "values", "first", "last", "lowest", "highest"]]
    for chart in charts:
        for x in chart.lines:
            if not x.thin:
                values = (x.y[0], x.y[-1], min(x.y), max(x.y))
                rows.append([chart.title, x.label, len(x.y), *map(figures.short, values)])
    return folded("numbers", table(rows, "curves"))


def curves(runs, args):
    groups, out = [groups_of(run) for run in runs], []
    for found in groups:
        parts = []
        for heading, charts in found.items():
            same = {key: [g[heading][key] for g in groups if key in g[heading]] for key in charts}
            drawn = [shown(chart, figures.bounds(chart, same[key]))
                     for key, chart in charts.items()]
            if drawn:
                parts.append(f"<h3>{text(heading)}</h3>{grid(drawn)}{digits(charts.values())}")
        out.append("".join(parts) or nothing("no step has been logged yet"))
    return out


# ------------------------------------------------------------------------------------- the scores

def scored(run):
    """The closing tables of a run: [(heading, whom others are compared with, rows as
    evidence.scores_of gives them), …]."""
    found = {}
    for stage in run.stages:
        for bench in ("bench", "bench-wrong-image"):
            path = stage.folder / bench / "results.json"
            if path.exists():
                found[stage.name, bench] = \
                    path, files.read_json(path, "benchmarks", "groups", "average")
    out, blind = [], ("pretrain", "bench-wrong-image")
    if blind in found and ("pretrain", "bench") in found:
        both = {"pretrain": found["pretrain", "bench"], "wrong image": found[blind]}
        out.append(("Stage 1, and shown the wrong images", "pretrain",
                    evidence.scores_of(both, list(both))))
    trained = {name: both for (name, bench), both in found.items() if bench == "bench"}
    if trained:
        out.append(("The trained models", next(iter(trained)),
                    evidence.scores_of(trained, list(trained))))
    if run.evidence:
        out += [(heading, run.evidence.names[1], rows) for heading, rows in run.evidence.sections]
    return out


def score_figures(run):
    """Those tables as dots and bars, and their digits: [(heading, [Dots, …], rows of text), …]."""
    out = []
    for heading, base, rows in scored(run):
        rows = [(label, {run.method(n): c for n, c in cells.items()},
                 {run.method(n): c for n, c in apart.items()})
                for label, cells, apart in rows if cells]
        if not rows:
            continue
        labels = {n: run.label(n) for _, cells, apart in rows for n in (*cells, *apart)}
        for _, cells, _ in rows:              # the heat's: of no encoder, and chance beside it
            labels |= {n: "chance" for n, c in cells.items() if c.text.startswith("chance")}
        drawn = [Dots(f"scores {heading}", heading,
                      [(label, cells) for label, cells, _ in rows], labels)]
        compared = {n for *_, apart in rows for n in apart}
        if compared:
            drawn.append(Dots(f"changes {heading}", f"{heading}: difference to {run.label(base)}",
                              [(label, apart) for label, _, apart in rows if apart], labels,
                              zero=True))
        said = [[heading, *labels.values(), *(f"{labels[n]}, difference" for n in labels
                                              if n in compared)]]
        for label, cells, apart in rows:
            said.append([label, *(cells[n].text if n in cells else "–" for n in labels),
                         *(apart[n].text if n in apart else "–" for n in labels
                           if n in compared)])
        out.append((heading, drawn, said))
    return out


def scores(runs, args):
    out = []
    for run in runs:
        found = score_figures(run)
        drawn = grid([shown(figure, None) for _, both, _ in found for figure in both])
        said = "".join(table(rows, heading) for heading, _, rows in found)
        out.append(drawn + folded("numbers", said) if found else
                   nothing("nothing has been scored yet"))
    return out


# ---------------------------------------------------------------------------- inside the encoder

def moved_charts(run):
    """How far every block moved, against the original and since stage 1: [Chart, …]."""
    out = []
    for key, title in (("moved", f"Against the original, {run.arguments['encoder']}"),
                       ("moved_since_parent", "Since the stage before")):
        lines, names = [], []
        for stage in run.stages:
            found = stage.extracted.get(key)
            if found:
                blocks = blocks_of(found)
                first = {"emb.": v for k, v in found.items() if k == "embeddings"}
                values = {**first, **{str(i): v for i, v in enumerate(blocks.values(), 1)}}
                names = max(names, list(values), key=len)
                lines.append(Line(stage.name, run.label(stage.name), list(range(len(values))),
                                  list(values.values())))
        if lines:
            out.append(Chart(key, title, lines, "block (emb.: what stands before the first)",
                             names=tuple(names)))
    return out


def drawn_together(charts_by_run, empty):
    """Charts of the same key, in all runs up to the same height."""
    out = []
    for charts in charts_by_run:
        drawn = []
        for chart in charts:
            kind = chart.key.split(":")[0]
            same = [c for found in charts_by_run for c in found if c.key.split(":")[0] == kind]
            drawn.append(shown(chart, figures.bounds(chart, same)))
        rows = [["", "", *max((c.names for c in charts), key=len, default=())]]
        for chart in charts:
            rows += [[chart.title, x.label, *map(figures.short, x.y)]
                     for x in chart.lines if not x.thin and ":" not in chart.key]
        said = folded("numbers", table(rows, charts[0].key)) if len(rows) > 1 else ""
        out.append(grid(drawn) + said if drawn else nothing(empty))
    return out


def moved(runs, args):
    return drawn_together([moved_charts(run) for run in runs],
                          "no encoder has been extracted yet (extract.py writes moved.json)")


def path_charts(run):
    """The way of the gradient: of each whole loss, then of its tokens, thin: [Chart, …]."""
    found = run.json("probes", "gradcam", "path.json")
    if not found:
        return []
    lines = {"whole": []}
    for name, way in found["methods"].items():
        if not np.isfinite(way["whole"]).all():                         # a run that came apart
            continue
        whole = Line(name, run.label(name), range(len(way["whole"])), way["whole"])
        most = sorted(way["tokens"], key=lambda token: -token["norms"][0])[:16]
        tokens = [Line(name, f"{token['answer']} {token['text']!r}", range(len(token["norms"])),
                       token["norms"], dashed=token["answer"] == "rejected", thin=True)
                  for token in most if min(token["norms"]) > 0]        # a token may send nothing
        lines["whole"].append(whole)
        lines[name] = [whole, *tokens]
    if not lines["whole"]:
        return []
    short = {"image positions": "image", "projector": "proj.", "patch embedding": "patch"}
    names = tuple(short.get(name, name.removeprefix("block ")) for name in found["stations"])
    titles = {"whole": "Norm of the gradient"} | {
        name: f"Norm of the gradient: {run.label(name)}, token by token" for name in lines
        if name != "whole"}
    log = all(min(line.y) > 0 for drawn in lines.values() for line in drawn)
    return [Chart(f"path:{name}", titles[name], drawn,
                  "image positions, projector, blocks, patch embedding", log=log, names=names)
            for name, drawn in lines.items()]


def token_table(found):
    rows = [["", "pull", *found["stations"]]]
    for name, way in found["methods"].items():
        rows.append([f"{evidence.heading_of(name)}, whole", "", *map(figures.short, way["whole"])])
        for token in way["tokens"]:
            rows.append([f"{evidence.heading_of(name)}, {token['answer']} {token['text']!r}",
                         figures.short(token["pull"]), *map(figures.short, token["norms"])])
    return table(rows, "path tokens")


def path(runs, args):
    drawn = drawn_together([path_charts(run) for run in runs],
                           "not traced yet (gradcam.py --path)")
    for i, run in enumerate(runs):
        if found := run.json("probes", "gradcam", "path.json"):
            said = f"{found['question']}   chosen: {found['chosen']}   rejected: " \
                   f"{found['rejected']}"
            drawn[i] = f'<p class="data"><bdi>{text(said)}</bdi></p>{drawn[i]}' \
                + folded("tokens", token_table(found))
    return drawn


def pictures(*parts, alt, empty):
    """A section that shows one picture file of a probe."""
    def section(runs, args):
        paths = [run.folder.joinpath("probes", *parts) for run in runs]
        return [embedded(p, alt) if p.exists() else nothing(empty) for p in paths]
    return section


def heat_figures(run):
    found, out = run.json("probes", "align", "results.json") or {"scores": []}, []
    for s in found["scores"]:
        best = s["rows"].index(s["block"]), s["columns"].index(s["layer"])
        out.append(Heat(f"align-{s['encoder']}-{s['llm']}", f"{run.label(s['encoder'])} with "
                        f"{s['llm']}: {s['text']}", s["rows"], s["columns"], s["map"], best))
    return out


def alignment(runs, args):
    heats = [heat_figures(run) for run in runs]
    values = [np.array(h.values) for found in heats for h in found]
    ranges = (min(v.min() for v in values), max(v.max() for v in values)) if values else None
    note = nothing(f"dark {ranges[0]:.3f}, bright {ranges[1]:.3f}; framed: the best cell") \
        if values else ""
    return [note + grid([shown(h, ranges) for h in found]) if found else
            nothing("not measured yet (probe_align.py)") for found in heats]


# ----------------------------------------------------------------------------------- the questions

class Pictures:
    """Every picture of the page once, however often it is shown."""

    def __init__(self):
        self.ids, self.symbols = {}, []

    def shown(self, question):
        key = str(question.tsv), question.row["image_id"]
        if key not in self.ids:
            uri, size = questions.picture(question)
            self.ids[key] = uri if size is None else f"p{len(self.symbols)}"
            if size:
                wide, tall = size
                self.symbols.append(
                    f'<symbol id="p{len(self.symbols)}" viewBox="0 0 {wide} {tall}"><image '
                    f'width="{wide}" height="{tall}" href="{uri}"/></symbol>')
        name = self.ids[key]
        if not name[1:].isdigit():
            return nothing(name)
        return f'<svg role="img" aria-label="the picture"><use href="#{name}"/></svg>'

    def store(self):
        return f'<svg class="store" aria-hidden="true">{"".join(self.symbols)}</svg>'


def worth(value):
    if value in (0, 1):
        return '<span class="good">✓</span>' if value else '<span class="bad">✗</span>'
    return f'<span class="soft">{value:.2f}</span>'


def asked(run, pictures, question, models):
    """A question with its picture, what is right, and what these models said."""
    rows = "".join(
        f'<tr><td>{text(label)}</td><td><div class="data"><bdi>{text(question.said[name][0])}</bdi>'
        f"</div></td><td>{worth(question.said[name][1])}</td></tr>"
        for name, label in models.items() if name in question.said)
    differ = "" if question.rank[0] else " · models differ"
    return (f'<article class="q">{pictures.shown(question)}<div><p class="meta">'
            f'{text(question.bench)} · {text(question.index)}{differ}</p>'
            f'<div class="data"><bdi>{text(question.asked)}</bdi></div>'
            f'<p>right: <b><bdi>{text(question.right)}</bdi></b></p><table>{rows}</table>'
            f"</div></article>")


def models_of(run):
    """{name: (label, its bench/ folder)}: the trained models, then the re-paired ones."""
    found = {s.name: (run.label(s.name), s.folder / "bench") for s in run.stages}
    found |= {f"repair/{s.name}": (f"re-paired {run.label(s.name)}", s.folder / "bench")
              for s in run.repairs}
    return {name: both for name, both in found.items() if both[1].is_dir()}


def answers(runs, args):
    out, pictures = [], Pictures()
    if not args.questions and not args.wrong:                # nor are the benchmark files read
        return [nothing("left out, by --questions 0 --wrong 0") for _ in runs]
    for run in runs:
        models = models_of(run)
        labels = {name: label for name, (label, _) in models.items()}
        by_bench, lost = questions.gather({n: f for n, (_, f) in models.items()}, args.bench)
        parts = [nothing(line) for line in lost]
        chosen = questions.to_show(by_bench, args.questions)
        parts.append('<div class="questions">' + "".join(
            asked(run, pictures, q, labels) for q in chosen) + "</div>")
        counts = [["not fully right", *by_bench]]
        for name, label in labels.items():
            found = questions.wrong(by_bench, name)
            asked_in_all = {b: sum(name in q.said for q in qs) for b, qs in by_bench.items()}
            counts.append([label, *(f"{len(found[b])} of {asked_in_all[b]}" for b in by_bench)])
            some = "".join(asked(run, pictures, q, {name: label})
                           for q in questions.picked(found, args.wrong))
            parts.append(folded(f"Wrong answers: {label}", f'<div class="questions">{some}</div>'))
        if by_bench:
            parts.insert(len(lost) + 1, f"<h3>Wrong answers</h3>{table(counts, 'wrong')}")
        out.append("".join(parts) if by_bench else "".join(parts[:len(lost)])
                   or nothing("no question has been answered yet"))
    out[0] = pictures.store() + out[0]
    return out


# ---------------------------------------------------------------------------------------- the page

SECTIONS = (
    ("recipe", "The recipe", "What every stage was made from. A digest is a hash: equal digests, "
     "equal things.", recipe),
    ("curves", "Curves", "Thin: every step (of many the lowest and the highest); thick: a moving "
     "mean over a fortieth of them.", curves),
    ("scores", "Scores", "In percent but for the alignment; bars: 95 % intervals (of the "
     "alignment: ± over subsets).", scores),
    ("moved", "How far the encoder moved", "Relative change of the weights of every block, "
     "‖w − w₀‖ / ‖w₀‖: a line a method.", moved),
    ("path", "The gradient's way", "One pair: what reaches the image positions, then the weights "
     "of projector, blocks (the last one first) and patch embedding. Thick: the whole loss; thin: "
     "one answer token each (dashed: of the rejected answer).", path),
    ("segmentation", "Segmentation", "Image, truth, and what a small head reads from each "
     "encoder's frozen patch tokens.", pictures("seg", "overlays.png", alt="segmentation overlays",
                                                empty="not measured yet (probe_seg.py)")),
    ("looks", "Where each loss looks", "The gradient of each pair's SFT and DPO loss, patch by "
     "patch.", pictures("gradcam", "gradcam.png", alt="heat of SFT and DPO",
                                    empty="not measured yet (gradcam.py)")),
    ("alignment", "Alignment", "Mutual k-NN of every block with every layer of the LLM.",
     alignment),
    ("questions", "Questions", "Those in which models differ come first.", answers))


def page_of(runs, args):
    """The whole page."""
    title = " | ".join(run.name for run in runs)
    about = "; ".join(f"{run.arguments['encoder']} with {run.arguments['llm']}" for run in runs)
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, *_ in SECTIONS)
    out = [layout.HEAD.format(title=text(title), style=layout.style(), about=text(about),
                              links=links), "<main>"]
    for key, heading, note, section in SECTIONS:
        columns = section(runs, args)
        if len(runs) > 1:
            columns = [f"<div><h3>{text(run.name)}</h3>{inside}</div>"
                       for run, inside in zip(runs, columns)]
        else:
            columns = [f"<div>{columns[0]}</div>"]
        out.append(f'<section id="{key}"><h2>{heading}</h2><p class="note">{note}</p>'
                   f'<div class="runs n{min(len(runs), 3)}">{"".join(columns)}</div></section>')
    return "\n".join([*out, "</main></body></html>\n"])


def draw_figures(runs, folder):
    """Every figure as a PNG of its own; → how many."""
    figures.pyplot()                                      # before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for run in runs:
        found = [(f"{heading.split(':')[0]}-{chart.key}", chart)
                 for heading, charts in groups_of(run).items() for chart in charts.values()]
        found += [(figure.key, figure) for _, drawn, _ in score_figures(run) for figure in drawn]
        found += [(figure.key, figure) for figure in (*moved_charts(run), *path_charts(run),
                                                      *heat_figures(run))]
        for name, figure in found:
            name = f"{run.name} {name}" if len(runs) > 1 else name
            name = re.sub(r"[^\w.]+", "-", name.lower()) + ".png"
            files.write_aside(folder / name, lambda aside: figures.draw_png(figure, aside))
            count += 1
    return count


def main():
    parser = flags.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, e.g. "
                        "runs/toy-vit__toy-lm; several are shown side by side")
    parser.add_argument("--out", type=Path, help="the file to write (default RUN/page.html; of "
                        "several runs page.html beside the first)")
    parser.add_argument("--bench", help="folder of the benchmark TSVs, where they are not where "
                        "the run found them")
    parser.add_argument("--questions", type=flags.NATURAL, default=40,
                        help="so many questions with every model's answer (default 40)")
    parser.add_argument("--wrong", type=flags.NATURAL, default=20,
                        help="so many wrong answers of each model besides (default 20)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write the figures alone, a PNG "
                        "each, into DIR")
    args = parser.parse_args()
    began = time.perf_counter()
    runs = [Run(folder) for folder in args.runs]
    if args.png:
        print(f"wrote {draw_figures(runs, args.png)} figures to {args.png}")
        return
    first = runs[0].folder
    out = args.out or (first if len(runs) == 1 else first.resolve().parent) / "page.html"
    page = page_of(runs, args)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, page)
    print(f"wrote {out}: {len(page.encode()) / 1e6:.2f} MB, in "
          f"{time.perf_counter() - began:.1f} s; open it in a browser")


if __name__ == "__main__":
    distributed.launch(main)
