"""The ground floor: lines for people."""


def first_line(error):
    """The first line of an exception: what a person needs, without the traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def table(rows):
    """Rows of strings, the header first → lines: the first column to the left, others to the
    right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return lines


def curve(values, parts=10):
    """A run's numbers in so many words: the mean of each of that many stretches, equal but for
    rounding; all of them, where there are fewer."""
    parts = min(parts, len(values))
    ends = [round(i * len(values) / parts) for i in range(parts + 1)]
    return " ".join(f"{sum(values[a:b]) / (b - a):.4g}" for a, b in zip(ends, ends[1:]))
