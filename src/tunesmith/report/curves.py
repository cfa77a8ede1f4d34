"""Curves of a run as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[int, float]]

# Drawn in colours that no one would choose, which the page then replaces by its own, so that one
# drawing serves the light and the dark page.
_COLOURS: Final = {
    "#010203": "var(--line)",
    "#010204": "var(--mark)",
    "#010205": "var(--muted)",
    "#010206": "var(--grid)",
}
LINE, MARK, TEXT, GRID = _COLOURS
_ON_WHITE: Final = {
    "var(--line)": "#1f5fbf",
    "var(--mark)": "#c2410c",
    "var(--muted)": "#5c6370",
    "var(--grid)": "#e3e5e8",
}
_MOST_POINTS: Final = 400
_SMOOTHING: Final = 0.9


class Chart(NamedTuple):
    """One drawing and what it says."""

    title: str
    caption: str
    """In words, for those who cannot see it: where it starts and ends."""
    svg: str


def draw(
    title: str, line: Points, *, marks: Points = (), smooth: bool = False, log: bool = False
) -> Chart:
    """Return a chart of (step, value) points.

    Args:
        title: what is shown, with its unit.
        line: drawn as a line; at least one point here or in `marks`.
        marks: drawn as dots with a line between them (evaluations).
        smooth: draw the line faint, and over it its exponential moving average.
        log: draw the values on a logarithmic scale, where they are positive and span a decade.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 11}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5.8, 2.8), layout="constrained")
        axes = figure.subplots()
        _plot(axes, line, marks, smooth=smooth)
        values = [value for _, value in (*line, *marks)]
        if log and 0 < 10 * min(values) <= max(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        style(axes)
        axes.set_xlabel("step", color=TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, _in_words(title, line or marks), for_page(file.getvalue()))


def _plot(axes: Axes, line: Points, marks: Points, *, smooth: bool) -> None:
    steps, values = _columns(thinned(line))
    smooth = smooth and len(steps) > 10
    if steps:
        single = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=LINE, lw=1.5, alpha=0.35 if smooth else 1, marker=single)
    if smooth:
        axes.plot(steps, smoothed(values), color=LINE, lw=2, label="training")
    if marks:
        axes.plot(*_columns(marks), color=MARK, lw=1.5, marker="o", ms=5, label="evaluation")
    if marks and steps:
        axes.lines[-2].set_label("training")
        axes.legend(frameon=False, labelcolor=TEXT)


def style(axes: Axes) -> None:
    """Give axes the page's plain look: a grid, no frame, in its colours."""
    axes.tick_params(colors=TEXT, which="both", length=0)
    axes.grid(color=GRID, lw=0.8)
    axes.margins(x=0.02)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def thinned(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` points: means over neighbours, so that no peak of noise is chosen."""
    size = -(-len(points) // most) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group))
        for group in groups
    ]


def smoothed(values: Sequence[float], decay: float = _SMOOTHING) -> list[float]:
    """Return the exponential moving average, without the pull towards 0 at its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(total / weight)
    return means


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _in_words(title: str, points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    if first == last:
        return f"{title}: {start:.4g} at step {first}."
    values = [value for _, value in points]
    return (
        f"{title}: {start:.4g} at step {first}, {end:.4g} at step {last}; "
        f"lowest {min(values):.4g}, highest {max(values):.4g}."
    )


def for_page(svg: str) -> str:
    """Return the <svg> element alone, without size and metadata, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    # Several drawings share the page, and nothing refers to the groups' names.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg.strip()


def standalone(svg: str) -> str:
    """Return the drawing of a page as a file of its own: in the light page's colours, on white."""
    for variable, colour in _ON_WHITE.items():
        svg = svg.replace(variable, colour)
    return svg.replace("<svg", '<svg style="background: white"', 1) + "\n"
