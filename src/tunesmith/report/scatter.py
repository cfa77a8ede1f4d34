"""Pictures of a comparison as SVG: quality against a cost, and all curves over each other."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.report.curves import LINE, TEXT, Chart, for_page, smoothed, style, thinned
from tunesmith.report.findings import front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#9c755f")
"""Colours told apart on light and on dark paper (Tableau's ten, without its pale ones)."""
DASHES = ("-", "--", ":")


class Dot(NamedTuple):
    """One row in a picture."""

    name: str
    cost: float
    quality: float
    low: float | None
    high: float | None


def draw_costs(
    title: str, dots: Sequence[Dot], *, cost: str, quality: str, higher_is_better: bool
) -> Chart:
    """Return quality against a cost, with intervals and the Pareto front.

    The cost's axis is logarithmic where every cost is positive.

    Args:
        title: of the chart.
        dots: the rows.
        cost: name of the horizontal axis, with its unit.
        quality: name of the vertical axis.
        higher_is_better: which way quality points.
    """
    best = front([(dot.cost, dot.quality) for dot in dots], higher_is_better=higher_is_better)

    def plot(axes: Axes) -> None:
        for index, dot in enumerate(dots):
            colour = LINE if index in best else TEXT
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.cost] * 2, [dot.low, dot.high], color=colour, lw=1, alpha=0.6)
            axes.plot([dot.cost], [dot.quality], "o", ms=5, color=colour)
        axes.plot([dots[i].cost for i in best], [dots[i].quality for i in best], color=LINE, lw=1.2)
        _scale(axes, [dot.cost for dot in dots])
        label(axes, dots)

    caption = "On the front, by rising cost: " + ", ".join(dots[i].name for i in best) + "."
    return drawn(title, caption, plot, x=cost, y=quality, size=(5.8, 4.4))


def draw_curves(title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    """Return the smoothed training losses of all rows over each other."""

    def plot(axes: Axes) -> None:
        for number, (name, points) in enumerate(curves.items()):
            steps = [step for step, _ in thinned(points)]
            losses = smoothed([loss for _, loss in thinned(points)])
            axes.plot(
                steps,
                losses,
                color=PALETTE[number % len(PALETTE)],
                ls=DASHES[number // len(PALETTE) % len(DASHES)],
                lw=1.5,
                label=name,
            )
        axes.legend(
            frameon=False, labelcolor=TEXT, ncols=3, fontsize=8, loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
        )  # fmt: skip

    caption = f"Training loss of {len(curves)} rows, smoothed."
    return drawn(title, caption, plot, x="step", y="loss", size=(5.8, 5.4))


def _scale(axes: Axes, costs: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic, with plain numbers where it spans few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(costs) <= 0:
        return
    axes.set_xscale("log")
    if max(costs) < 1000 * min(costs):
        plain = FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}")
        if max(costs) < 10 * min(costs):
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_formatter(NullFormatter())


def label(axes: Axes, dots: Sequence[Dot]) -> None:
    """Write the names in a column on the right, each with a line to its dot.

    Beside the dots they would cover each other: good methods lie close together.
    """
    axes.margins(x=0.08, y=0.08)
    low, high = axes.get_ylim()
    ranked = sorted(dots, key=lambda dot: dot.quality)
    heights = spread([(dot.quality - low) / (high - low) for dot in ranked])
    for dot, height in zip(ranked, heights, strict=True):
        axes.annotate(
            dot.name,
            (dot.cost, dot.quality),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=TEXT,
            fontsize=8,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.6,
                "color": TEXT,
                "alpha": 0.35,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def spread(places: Sequence[float], *, gap: float = 0.05) -> list[float]:
    """Return rising `places` in 0..1 moved apart, so that neighbours are `gap` apart.

    With more of them than fit, the gap shrinks to what does.
    """
    gap = min(gap, 1 / max(1, len(places) - 1))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    ceiling = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved


def drawn(
    title: str,
    caption: str,
    plot: Callable[[Axes], None],
    *,
    x: str,
    y: str,
    size: tuple[float, float],
) -> Chart:
    """Return a chart of what `plot` draws, with the names of its axes and its size in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 11}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        style(axes)
        plot(axes)
        axes.set_xlabel(x, color=TEXT)
        axes.set_ylabel(y, color=TEXT)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, caption, for_page(file.getvalue()))
