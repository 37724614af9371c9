"""The figures of a run, each once as data, drawn as SVG for the page or as PNG for a slide.

A figure is a Chart (curves), Dots (numbers with their intervals) or Heat (a map of cells). One
method has one colour everywhere; the page's style sheet holds it for light and for dark. The SVG
carries its numbers in data- attributes, so that a test can read back what was drawn.
"""
import html
import math
import re
import zlib
from typing import NamedTuple

import numpy as np

# Method → its colour on light and on dark ground (after Okabe and Ito, which colour-blind readers
# tell apart), each at least 3 : 1 against the ground.
COLOURS = {"original": ("#6e6e6e", "#a6a6a6"), "pretrain": ("#111111", "#f2f2f2"),
           "sft": ("#0072b2", "#56b4e9"), "dpo": ("#d55e00", "#ff8f4a"),
           "mpo": ("#00795c", "#2fd0a2"), "grpo": ("#a8457e", "#e79cc7"),
           "ppo": ("#80650a", "#f0dc50"), "other0": ("#5b4bb5", "#b4a7ff"),
           "other1": ("#9a2d2d", "#ff9a9a"), "other2": ("#4c6b00", "#b9dd55")}
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 360, 220, 52, 10, 18, 34
PLOT = WIDTH - LEFT - RIGHT                      # columns of pixels a curve is thinned to
SHAPES = ("M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z", "M-4-4H4V4H-4Z",     # circle, square,
          "M0-5.5L5.5 0L0 5.5L-5.5 0Z", "M0-5L5 4.5H-5Z")                        # rhomb, triangle
UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e"
                    "\u2060-\u2069\u180e\ufeff\ud800-\udfff\U000e0000-\U000e007f]")


class Line(NamedTuple):
    """One curve. name: its method, which gives the colour; label: for the reader."""
    name: str
    label: str
    x: object
    y: object
    dashed: bool = False
    thin: bool = False                           # one of many: no mean, no place in the legend
    marks: bool = False                          # points instead of a line


class Chart(NamedTuple):
    """Curves over one axis. names: what stands at x = 0, 1, …, where x is no number."""
    key: str
    title: str
    lines: list
    x_label: str = "step"
    log: bool = False
    names: tuple = ()


class Dots(NamedTuple):
    """Numbers with intervals. rows: [(label, {name: evidence.Cell}), …]; zero: differences."""
    key: str
    title: str
    rows: list
    labels: dict                                 # {name: label}
    zero: bool = False


class Heat(NamedTuple):
    """A map. values (V, L); best: the cell (v, l) to be marked."""
    key: str
    title: str
    rows: list
    columns: list
    values: object
    best: tuple


# ----------------------------------------------------------------------------------------- as text

def text(value):
    """Anything from data as text of HTML: no markup, and what cannot be seen made visible, so that
    a mark that turns the direction of writing turns nothing here."""
    shown = UNSEEN.sub(lambda mark: f"[U+{ord(mark[0]):04X}]", str(value))
    return html.escape(shown, quote=True)


def short(value):
    """A number for an axis or a table."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def method(name):
    """The class of a method's colour: a fixed one, or one of three for stages of one's own."""
    if name in COLOURS:
        return f"m-{name}"
    return f"m-other{zlib.crc32(str(name).encode(errors='replace')) % 3}"


# ---------------------------------------------------------------------------------------- numbers

def thinned(x, y, columns=PLOT):
    """A curve as a screen shows it: of every column of pixels the lowest and the highest point, and
    the first and the last of all. x ascending, (n,) → indices, ascending."""
    if len(x) <= 2 * columns:
        return np.arange(len(x))
    at = np.minimum((np.asarray(x) - x[0]) * (columns / max(x[-1] - x[0], 1e-12)), columns - 1)
    begins = np.flatnonzero(np.diff(at.astype(int), prepend=-1))
    kept = [0, len(x) - 1]
    for begin, end in zip(begins, [*begins[1:], len(x)]):
        kept += [begin + int(np.argmin(y[begin:end])), begin + int(np.argmax(y[begin:end]))]
    return np.unique(kept)


def moving_mean(y):
    """Each value's mean with its neighbours, a fortieth of the curve; at the ends with fewer."""
    half = len(y) // 80
    sums = np.concatenate([[0.0], np.cumsum(y)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def bounds(chart, charts):
    """The ranges of a chart: as wide as its own curves, as high as those of all charts that are
    compared: (x0, x1, y0, y1)."""
    def all_of(charts, axis):
        return np.concatenate([np.asarray(getattr(line, axis), float)
                               for chart in charts for line in chart.lines])
    x, y = all_of([chart], "x"), all_of(charts, "y")
    if chart.log:
        y = y[y > 0]                                     # another run's chart may have a zero
    x0, x1, y0, y1 = map(float, (x.min(), x.max(), y.min(), y.max()))
    if chart.log:
        return x0, max(x1, x0 + 1), y0 / 1.2, y1 * 1.2
    if 0 <= y0 < y1 / 2:
        y0 = 0.0
    gap = 0.04 * (y1 - y0) or 0.05 * abs(y1) or 1.0
    return x0, max(x1, x0 + 1), y0 if y0 == 0 else y0 - gap, y1 + gap


def ticks(low, high, wanted=4):
    """Round numbers within a range."""
    step = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= wanted + 0.5)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9),
                                               math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """Powers of ten within a range, at most five; where there is at most one, 2 and 5 as well; in a
    narrow range those of an ordinary axis."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    if len(powers) > 1:
        return [10.0 ** p for p in powers][::math.ceil(len(powers) / 5)]
    first = math.floor(math.log10(low))
    found = [f * 10.0 ** p for p in range(first, first + 3) for f in (1, 2, 5)
             if low <= f * 10.0 ** p <= high]
    return found if len(found) > 1 else ticks(low, high)


# -------------------------------------------------------------------------------------------- SVG

def svg(key, title, width, height, inside, **data):
    """One picture: it grows with its place, up to a half more."""
    facts = "".join(f' data-{name}="{text(value)}"' for name, value in data.items())
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}" '
            f'data-key="{text(key)}"{facts}>{"".join(inside)}</svg>')


def words(x, y, said, how="start"):
    return f'<text class="{how}" x="{x:.1f}" y="{y:.1f}">{text(said)}</text>'


def places(chart, ranges):
    """Functions from a value to its place in the picture."""
    x0, x1, y0, y1 = ranges
    if chart.log:
        y0, y1 = math.log10(y0), math.log10(y1)

    def across(x):
        return LEFT + (np.asarray(x, float) - x0) / (x1 - x0) * PLOT

    def up(y):
        y = np.log10(y) if chart.log else np.asarray(y, float)
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    return across, up


def axes(chart, ranges):
    """Grid, ticks and their words."""
    (x0, x1, y0, y1), (across, up) = ranges, places(chart, ranges)
    out = []
    for y in (log_ticks if chart.log else ticks)(y0, y1):
        out.append(f'<path class="grid" d="M{LEFT} {up(y):.1f}H{WIDTH - RIGHT}"/>')
        out.append(words(LEFT - 5, up(y) + 4, short(y), "end"))
    bottom = HEIGHT - BOTTOM
    if chart.names:
        every = math.ceil(len(chart.names) / 9)
        last = len(chart.names) - 1
        for i, name in enumerate(chart.names):
            if i % every == 0 and (last - i >= every or i == last):
                out.append(words(across(i), bottom + 14, name, "middle"))
    else:
        out += [words(across(x), bottom + 14, short(x), "middle") for x in ticks(x0, x1)]
    out.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    return [*out, words(LEFT + PLOT / 2, HEIGHT - 4, chart.x_label, "middle")]


def curve(line, across, up):
    """A line: as it is, and, where it is long, its moving mean over it."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    first, last, least, most = map(float, (y[0], y[-1], y.min(), y.max()))
    label = (f"{line.label}: {len(x)} values, first {short(first)}, last {short(last)}, "
             f"lowest {short(least)}, highest {short(most)}")
    facts = (f'data-line="{text(line.label)}" data-n="{len(x)}" data-first="{first!r}" '
             f'data-last="{last!r}" data-min="{least!r}" data-max="{most!r}"')
    kind = f"{method(line.name)}{' dashed' if line.dashed else ''}"
    if line.marks:
        dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5"/>'
                       for a, b in zip(across(x), up(y)))
        return f'<g class="marks {kind}" {facts}><title>{text(label)}</title>{dots}</g>'

    def drawn(y, how, more=""):
        kept = thinned(x, y)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across(x[kept]), up(y[kept])))
        return f'<polyline class="{how} {kind}" points="{points}" {more}>'
    noisy = len(x) >= 80 and not line.thin
    how = "faint" if noisy else "thin" if line.thin else "curve"
    out = drawn(y, how, facts) + f"<title>{text(label)}</title></polyline>"
    return out + drawn(moving_mean(y), "curve") + "</polyline>" if noisy else out


def svg_chart(chart, ranges):
    across, up = places(chart, ranges)
    inside = axes(chart, ranges) + [curve(line, across, up) for line in chart.lines if len(line.x)]
    return svg(chart.key, chart.title, WIDTH, HEIGHT, inside, x=f"{ranges[0]!r} {ranges[1]!r}",
               y=f"{ranges[2]!r} {ranges[3]!r}", log=int(chart.log),
               box=f"{LEFT} {TOP} {WIDTH - RIGHT} {HEIGHT - BOTTOM}")


def mark(name, labels, x, y):
    """A method's mark: shapes, so that colour is not all that tells methods apart."""
    path = SHAPES[list(labels).index(name) % 4]
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{path}"/>'


def svg_dots(dots):
    """A row a number, a mark a method, its interval as a bar."""
    cells = [cell for _, row in dots.rows for cell in row.values()]
    zero = [0.0] if dots.zero else []
    low = min([c.value if c.low is None else c.low for c in cells] + zero)
    high = max([c.value if c.high is None else c.high for c in cells] + zero)
    gap = 0.06 * (high - low) or 1.0
    low, high = low - gap, high + gap
    left, step = 128, 15
    wide = WIDTH - left - RIGHT

    def across(value):
        return left + (value - low) / (high - low) * wide
    out, y = [], TOP
    for label, row in dots.rows:
        tall = step * len(row) + 8
        out.append(words(4, y + tall / 2 + 4, label if len(label) < 20 else label[:18] + "…"))
        for i, (name, cell) in enumerate(row.items()):
            at = y + 4 + step * (i + 0.5)
            bar = "" if cell.low is None else \
                f'<path class="bar" d="M{across(cell.low):.1f} {at:.1f}H{across(cell.high):.1f}"/>'
            ends = "" if cell.low is None else \
                f' data-low="{float(cell.low)!r}" data-high="{float(cell.high)!r}"'
            said = f"{label}, {dots.labels[name]}: {cell.text}"
            if cell.low is not None:
                said += f", from {short(cell.low)} to {short(cell.high)}"
            out.append(f'<g class="dot {method(name)}" data-row="{text(label)}" '
                       f'data-name="{text(name)}" data-value="{float(cell.value)!r}"{ends}>'
                       f'<title>{text(said)}</title>{bar}'
                       f'{mark(name, dots.labels, across(cell.value), at)}</g>')
        y += tall
        out.append(f'<path class="grid" d="M4 {y}H{WIDTH - RIGHT}"/>')
    under = [f'<path class="grid" d="M{across(x):.1f} {TOP}V{y}"/>'
             + words(across(x), y + 14, short(x), "middle") for x in ticks(low, high)]
    if dots.zero:
        under.append(f'<path class="axis" d="M{across(0):.1f} {TOP}V{y}"/>')
    return svg(dots.key, dots.title, WIDTH, y + 20, under + out, x=f"{low!r} {high!r}")


def colour_of(share):
    """0 … 1 → a colour of Viridis."""
    rgb = [int(np.interp(share, np.arange(5) / 4, channel)) for channel in VIRIDIS.T]
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def svg_heat(heat, ranges):
    """ranges: (lowest, highest) of all maps that are compared."""
    (V, L), (low, high) = np.shape(heat.values), ranges
    cell = max(7.0, min(34.0, (WIDTH - 40) / L))
    out = []
    for v, l in np.ndindex(V, L):
        value = float(heat.values[v][l])
        fill = colour_of((value - low) / max(high - low, 1e-12))
        best = ' class="best"' if (v, l) == tuple(heat.best) else ""
        out.append(f'<rect x="{34 + l * cell:.1f}" y="{TOP + v * cell:.1f}" width="{cell:.1f}" '
                   f'height="{cell:.1f}" fill="{fill}" data-value="{value!r}"{best}><title>block '
                   f'{text(heat.rows[v])}, layer {text(heat.columns[l])}: {short(value)}</title>'
                   f'</rect>')
    for names, place in ((heat.rows, lambda i: (28, TOP + (i + 0.5) * cell + 4, "end")),
                         (heat.columns, lambda i: (34 + (i + 0.5) * cell, TOP + V * cell + 14,
                                                   "middle"))):
        every = math.ceil(14 / cell)
        out += [words(x, y, name, how) for i, name in enumerate(names) if i % every == 0
                for x, y, how in [place(i)]]
    out.sort(key=lambda part: 'class="best"' in part)            # its frame lies over the others
    tall = TOP + V * cell + 34
    out.append(words(34, tall - 4, "down: block of the encoder; across: layer of the LLM"))
    return svg(heat.key, heat.title, max(WIDTH, round(40 + L * cell)), round(tall), out)


# -------------------------------------------------------------------------------------------- PNG

def pyplot():
    """matplotlib, a development requirement; raises SystemExit where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("error: --png needs matplotlib: pip install -r requirements-dev.txt")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.family": "serif", "mathtext.fontset": "cm", "font.size": 11,
                         "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})
    return plt


def plain(words):
    """Words from data for matplotlib, which would read mathematics between two dollars."""
    return str(words).replace("$", r"\$")


def paper_colour(name):
    return COLOURS[method(name)[2:]][0]


def png_chart(axis, chart):
    for line in chart.lines:
        x, y = np.asarray(line.x, float), np.asarray(line.y, float)
        look = dict(color=paper_colour(line.name), linestyle="--" if line.dashed else "-")
        if line.marks:
            axis.plot(x, y, "o", color=look["color"], label=plain(line.label))
        elif line.thin:
            axis.plot(x, y, **look, linewidth=0.6, alpha=0.5)
        elif len(x) >= 80:
            axis.plot(x, y, **look, linewidth=0.6, alpha=0.3)
            axis.plot(x, moving_mean(y), **look, linewidth=1.8, label=plain(line.label))
        else:
            axis.plot(x, y, **look, linewidth=1.8, label=plain(line.label))
    axis.set_yscale("log" if chart.log else "linear")
    axis.set_xlabel(chart.x_label)
    if chart.names:
        turned = 90 if len(chart.names) > 9 else 20
        axis.set_xticks(range(len(chart.names)), [*map(plain, chart.names)], rotation=turned,
                        fontsize=8)
    axis.legend()


def png_dots(axis, dots):
    names = list(dots.labels)
    for i, (label, row) in enumerate(dots.rows):
        for j, (name, cell) in enumerate(row.items()):
            y = -i - 0.8 * (j - (len(row) - 1) / 2) / max(len(row), 2)
            half = None if cell.low is None else [[cell.value - cell.low], [cell.high - cell.value]]
            axis.errorbar(cell.value, y, xerr=half, fmt="osD^"[names.index(name) % 4],
                          color=paper_colour(name), capsize=2, markersize=5,
                          label=None if i else plain(dots.labels[name]))
    axis.set_yticks([-i for i in range(len(dots.rows))], [plain(label) for label, _ in dots.rows])
    if dots.zero:
        axis.axvline(0, color="black", linewidth=0.8)
    axis.legend(fontsize=9)


def png_heat(axis, heat):
    seen = axis.imshow(heat.values, cmap="viridis")
    axis.grid(False)
    axis.set_xticks(range(len(heat.columns)), [*map(plain, heat.columns)], fontsize=7)
    axis.set_yticks(range(len(heat.rows)), [*map(plain, heat.rows)], fontsize=7)
    (v, l) = heat.best
    axis.plot([l - 0.5, l + 0.5, l + 0.5, l - 0.5, l - 0.5],
              [v - 0.5, v - 0.5, v + 0.5, v + 0.5, v - 0.5], color="red", linewidth=2)
    axis.set_xlabel("layer of the LLM")
    axis.set_ylabel("block of the encoder")
    axis.figure.colorbar(seen, ax=axis)


def draw_png(figure, path):
    """One figure as a PNG for a slide."""
    plt = pyplot()
    tall = 1.2 + 0.5 * len(figure.rows) if isinstance(figure, Dots) else 3.6
    sheet, axis = plt.subplots(figsize=(6, max(tall, 2.4)), layout="constrained")
    {Chart: png_chart, Dots: png_dots, Heat: png_heat}[type(figure)](axis, figure)
    axis.set_title(plain(figure.title), fontsize=11)
    sheet.savefig(path, format="png", dpi=200, metadata={"Software": None})
    plt.close(sheet)
