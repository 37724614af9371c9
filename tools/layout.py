"""How the page of a run looks: its style sheet, for light and dark, and the pieces it is made of.

Every word from data goes through figures.text on its way to the page.
"""
from PIL import Image

from pivot import images, records
from tools import figures, questions
from tools.figures import COLOURS, Chart, Dots, text

# Name in the style sheet → colour on light and on dark ground. Words: ink, soft, good, bad, link.
PALETTE = {"paper": ("#ffffff", "#14161a"), "card": ("#f6f6f3", "#1e2127"),
           "ink": ("#1c1c1c", "#e8e8e8"), "soft": ("#565656", "#b3b7bd"),
           "good": ("#0a6629", "#74d697"), "bad": ("#a80020", "#ff9d9d"),
           "link": ("#0b5394", "#8cc4ff"), "rule": ("#d9d9d4", "#3a3f48")}
STYLE = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
METHODS
* { box-sizing: border-box }
body { margin: 0 auto; padding: 0 1rem 3rem; max-width: 100rem; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, "Segoe UI", "Noto Sans", sans-serif }
h1 { font-size: 1.5rem; margin: 1.2rem 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .3rem; padding-top: .6rem;
  border-top: 2px solid var(--rule) }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere }
p { margin: .3rem 0; max-width: 60rem } p.note, .meta { color: var(--soft) }
a { color: var(--link) } nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem }
code { font: .85em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
.runs { display: grid; gap: 0 2rem; grid-template-columns: minmax(0, 1fr) }
.strip { display: grid; gap: .8rem; margin: .6rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(14rem, 100%), 1fr)) }
.card { background: var(--card); border-top: 4px solid var(--c, var(--rule)); padding: .6rem .8rem;
  border-radius: 4px; overflow-wrap: anywhere }
.card h3 { margin: 0 } .card dl { margin: .4rem 0 0; font-size: .87rem }
.card dt { color: var(--soft); float: left; clear: left; margin-right: .5em }
.card dd { margin: 0 } .card code { font-size: .75rem }
.good { color: var(--good) } .bad { color: var(--bad) } .soft { color: var(--soft) }
.missing { background: var(--card); padding: .6rem .8rem; border-radius: 4px }
.missing li { margin: .15rem 0 } .missing ul { margin: .2rem 0; padding-left: 1.2rem }
.figures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
figure { margin: 0; background: var(--card); padding: .6rem; border-radius: 4px; min-width: 0 }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .3rem }
figcaption span { font-weight: 400; margin-right: .7em; display: inline-block; max-width: 100% }
figcaption { overflow-wrap: anywhere }
figure > svg { display: block; width: 100%; max-width: 34rem; height: auto }
.picture { width: fit-content; max-width: 100% }
figure > img { display: block; max-width: 100%; height: auto }
svg text { fill: var(--soft); font: 11px system-ui, "Segoe UI", "Noto Sans", sans-serif }
svg text.end { text-anchor: end } svg text.middle { text-anchor: middle }
svg .grid { stroke: var(--rule); fill: none } svg .axis { stroke: var(--soft); fill: none }
svg polyline { fill: none; stroke: var(--c); stroke-linejoin: round; stroke-width: 2 }
svg polyline.faint { stroke-width: 1; opacity: .35 }
svg polyline.thin { stroke-width: .8; opacity: .6 }
svg .dashed { stroke-dasharray: 5 3 }
svg .marks circle { fill: var(--card); stroke: var(--c); stroke-width: 2 }
svg .dot path { fill: var(--c) } svg .dot .bar { stroke: var(--c); stroke-width: 2; fill: none }
svg rect.best { stroke: #ff2d2d; stroke-width: 2.5 }
svg.key { width: 1.6em; height: .8em; margin-right: .3em; vertical-align: middle }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .87rem }
th, td { text-align: right; padding: .1rem .6rem .1rem 0; vertical-align: top }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
th { color: var(--soft); font-weight: 600 }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--link) }
.questions { display: grid; gap: .8rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(27rem, 100%), 1fr)) }
.q { background: var(--card); border-radius: 4px; padding: .6rem; display: flex; gap: .8rem }
.q > svg, .q > p { flex: 0 0 7rem; width: 7rem; overflow-wrap: anywhere }
.q > svg { height: 7rem } .q > div { min-width: 0; flex: 1 }
.q .meta { font-size: .8rem } .data { white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 12rem; overflow-y: auto; margin: .1rem 0 }
.q table { width: 100% } .q td .data { margin: 0 }
.q td { text-align: left } .q td:first-child { white-space: nowrap; color: var(--soft) }
.q td:nth-child(2) { width: 100% }
.q td:last-child { text-align: right; padding-right: 0 } .store { display: none }
@media (min-width: 60rem) { .n2 { grid-template-columns: repeat(2, minmax(0, 1fr)) }
  .n3 { grid-template-columns: repeat(3, minmax(0, 1fr)) } }
@media (max-width: 30rem) { .q { flex-direction: column } }
@media print { :root { color-scheme: light; LIGHT } nav { display: none }
  body { max-width: none; font-size: 11px } .data { max-height: none }
  figure, .card, .q { break-inside: avoid } h2, h3, p.note { break-after: avoid }
  .questions { grid-template-columns: 1fr 1fr }
  details.numbers::details-content { content-visibility: visible; height: auto }
  figure > img { max-height: 23cm; width: auto } h2 { margin-top: 1rem }
  * { print-color-adjust: exact } }
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body>
<header><h1>{title}</h1><p class="note">{about}</p><nav aria-label="Sections">{links}</nav></header>
"""


def style():
    """The style sheet, with the colours of both grounds."""
    every = {**PALETTE, **{f"m-{name}": both for name, both in COLOURS.items()}}
    light, dark = ("; ".join(f"--{name}: {both[i]}" for name, both in every.items())
                   for i in (0, 1))
    methods = "\n".join(f".m-{name} {{ --c: var(--m-{name}) }}" for name in COLOURS)
    return STYLE.replace("LIGHT", light).replace("DARK", dark).replace("METHODS", methods)


def legend(entries):
    """entries: [(method, label, dashed or the index of its mark), …]."""
    out = []
    for name, label, how in dict.fromkeys(entries):
        if isinstance(how, bool):
            inside = f'<polyline class="{"dashed" if how else "curve"}" points="0,5 20,5"/>'
        else:
            inside = f'<g class="dot"><path transform="translate(10 5)" ' \
                     f'd="{figures.SHAPES[how % 4]}"/></g>'
        out.append(f'<span><svg class="key {figures.method(name)}" viewBox="0 0 20 10" '
                   f'aria-hidden="true">{inside}</svg>{text(label)}</span>')
    return "".join(out)


def shown(figure, ranges):
    """A figure with its caption."""
    if isinstance(figure, Chart):
        entries = [(x.name, x.label, 0 if x.marks else x.dashed) for x in figure.lines
                   if not x.thin and len(x.x)]
        picture = figures.svg_chart(figure, ranges)
    elif isinstance(figure, Dots):
        there = {name for _, row in figure.rows for name in row}
        entries = [(name, label, i) for i, (name, label) in enumerate(figure.labels.items())
                   if name in there]
        picture = figures.svg_dots(figure)
    else:
        entries, picture = [], figures.svg_heat(figure, ranges)
    return f"<figure><figcaption>{text(figure.title)}<br>{legend(entries)}</figcaption>" \
           f"{picture}</figure>"


def table(rows, name=""):
    """Rows of text, the header first, in a box that scrolls where the screen is narrow."""
    head, *body = [[text(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{c}</th>" for c in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in body]
    return f'<div class="scroll"><table data-table="{text(name)}">{"".join(lines)}</table></div>'


def folded(summary, inside):
    """What a reader opens; numbers are open on paper."""
    return f'<details class="{"numbers" if summary == "numbers" else "more"}"><summary>' \
           f"{text(summary)}</summary>{inside}</details>"


def grid(drawn):
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""


def nothing(what):
    return f'<p class="note">{text(what)}</p>'


def embedded(path, alt):
    """A picture file of an instrument, decoded and written anew; or what is wrong with it."""
    try:
        pixels = images.load_image(str(path), None, str(path))
    except records.BadRecord as e:
        return nothing(e)
    uri, (wide, tall) = questions.jpeg(Image.fromarray(pixels.transpose(1, 2, 0)), 2400)
    return f'<figure class="picture"><img src="{uri}" width="{wide}" height="{tall}" ' \
           f'alt="{text(alt)}"></figure>'
