"""How numbers of the demonstrations of alignment are written, and what is said of how they came."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunesmith.measure.intervals import wilson_interval

Found = dict[str, Any]
MISSING = "Not measured yet."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    every = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every)


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Return a share, with its interval where there is one."""
    if value is None:
        return "-"
    if interval is None:
        return f"{value:.1%}"
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def counted(value: float | None, of: int | None) -> str:
    """Return a share of so many, with Wilson's interval."""
    if value is None or of is None:
        return percent(value)
    return percent(value, wilson_interval(round(value * of), of))


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number, or a dash."""
    return "-" if value is None else format(value, form)


def interval(ends: Sequence[float] | None) -> str:
    """Return an interval in brackets."""
    return "" if ends is None else f"({ends[0]:.3g} to {ends[1]:.3g})"


def minutes(seconds: float) -> str:
    """Return a time in minutes, or in seconds where it is short."""
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def reached(run: Found) -> str:
    """Return the step of the numbers of a run, and where it was stopped."""
    if not (stopped := run.get("stopped")):
        return f"{run['steps']} (the end)"
    return f"{run['steps']} (stopped at {stopped['at']} of {stopped['of']})"


def stops(runs: Mapping[str, Found]) -> str:
    """Return a sentence about the runs that did not come to their end; empty where all did."""
    parts = [
        f"{name} at step {run['stopped']['at']} of {run['stopped']['of']}"
        for name, run in runs.items()
        if "stopped" in run
    ]
    if not parts:
        return ""
    return (
        f" Stopped from outside before the end: {'; '.join(parts)}. The numbers are those of the "
        "last evaluation before that."
    )


def every_run(found: Found) -> Iterator[Found]:
    """Yield all runs there are, those of chains one by one."""
    for one in found.values():
        yield from one.get("stages", {"": one}).values()


def side_by_side(found: Found, runs: Sequence[Found]) -> str:
    """Return a sentence about other runs of ours on the same device at the same time, if any."""
    most = max((beside(found, run) for run in runs), default=0)
    if not most:
        return ""
    return (
        f" Up to {most} other runs shared the device and its processor cores at the same time, so "
        "times are upper bounds of what a run takes alone."
    )


def beside(found: Found, run: Found) -> int:
    """Return the largest number of other runs on a run's device at a time of it."""
    gone = [one for entry in found.values() for one in entry.get("replaced", [])]
    runs = [*every_run(found), *gone]
    others = [span for one in runs if one["device"] == run["device"] for span in one["ran"]]
    times = [begin for begin, _ in (*others, *run["ran"])]
    inside = [t for t in times if any(begin <= t < end for begin, end in run["ran"])]
    return max((sum(b <= t < e for b, e in others) - 1 for t in inside), default=0)


def command(one: Found, run: Found) -> str:
    """Return how something was measured."""
    return f"`{' '.join([one['command'], *one.get('changed', [])])}` on one {run['device']}."


def samples_of(run: Found) -> str:
    """Return replies of a run before and after."""
    rows = [
        [quoted(s["prompt"]), quoted(s.get("before") or ""), quoted(s.get("after") or "")]
        for s in run["samples"]
    ]
    return table(("prompt", "before", f"after {run['steps']} steps"), rows)


def quoted(text: str) -> str:
    """Return text that is safe in a cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
