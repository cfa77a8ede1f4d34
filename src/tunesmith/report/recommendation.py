"""What a comparison comes down to, said in words that its numbers decide."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.report import words
from tunesmith.report.findings import SIGNIFICANT, Findings, FoundRow

Cost = Callable[[FoundRow], float | None]


def recommendation(findings: Findings) -> list[str]:
    """Return sentences: the best row, which others are as good, and what they save."""
    trained = findings.trained
    if not trained:
        return ["Nothing was trained to its end, so there is nothing to recommend."]
    best, equal = trained[0], findings.as_good_as_best()
    return [
        _best(findings, best),
        *_nothing_learned(findings),
        _others(findings, best, equal),
        *_savings(findings, best, equal),
        *_forgetting(best, equal),
        *_one_seed(findings),
        *_failures(findings),
    ]


def value(findings: Findings, row: FoundRow) -> str:
    """Return a row's quality with its interval."""
    shown = words.metric(findings.metric, row.quality)
    if row.low is None or row.high is None:
        return shown
    low, high = (words.metric(findings.metric, end) for end in (row.low, row.high))
    return f"{shown} ({low} to {high})"


def _best(findings: Findings, best: FoundRow) -> str:
    base = next((row for row in findings.rows if row.baseline), None)
    before = f", from {words.metric(findings.metric, base.quality)} untuned" if base else ""
    return (
        f"{best.name} came out best: {words.metric_name(findings.metric)} "
        f"{value(findings, best)}{before}."
    )


def _nothing_learned(findings: Findings) -> list[str]:
    if findings.learned():
        return []
    return [
        "Nothing beat the untuned model, so the order says nothing about the methods: give them "
        "more steps, more data, or more rows to be judged by."
    ]


def _others(findings: Findings, best: FoundRow, equal: list[FoundRow]) -> str:
    if len(findings.trained) == 1:
        return "No other row has a result to compare it with."
    if best.low is None:
        return "Intervals could not be computed, so the order alone says little."
    names = [row.name for row in equal if row.name != best.name]
    if not names:
        return f"Every other row is worse beyond chance (p < {SIGNIFICANT})."
    return (
        f"{len(names)} of the other {len(findings.trained) - 1} cannot be told from it "
        f"(p >= {SIGNIFICANT}): {', '.join(names)}."
    )


def _one_seed(findings: Findings) -> list[str]:
    """Say what the intervals leave out where nothing was trained twice."""
    if not findings.one_seed or len(findings.trained) < 2:
        return []
    return [
        "Every row is of one seed: the intervals cover which rows were judged, not the luck of "
        "initial weights and of the data's order, and another seed may turn neighbours round."
    ]


def _savings(findings: Findings, best: FoundRow, equal: list[FoundRow]) -> list[str]:
    """Say which row among the equally good costs least, for each cost."""
    costs: list[tuple[str, Cost, Callable[[float], str]]] = [
        ("stores the least a task", lambda row: row.stored_bytes, words.size),
        ("takes the least memory", lambda row: row.peak_bytes, words.size),
        ("is the fastest a step", lambda row: row.seconds_per_step, _seconds),
    ]
    said = []
    for what, cost, show in costs:
        priced = [(price, row) for row in equal if (price := cost(row)) is not None]
        if len({price for price, _ in priced}) < 2:
            continue
        price, row = min(priced, key=lambda pair: pair[0])
        most = cost(best)
        against = "" if row is best or most is None else f", against {show(most)} of {best.name}"
        said.append(f"Of those, {row.name} {what}: {show(price)}{against}.")
    return said


def _forgetting(best: FoundRow, equal: list[FoundRow]) -> list[str]:
    measured = [(f, row) for row in equal if (f := row.forgetting) is not None]
    if not measured or best.forgetting is None:
        return []
    least, row = min(measured, key=lambda pair: pair[0])
    other = "" if row is best else f"; {row.name} forgets least, {least:+.3f}"
    return [f"On general text {best.name} moves the loss by {best.forgetting:+.3f} nats{other}."]


def _failures(findings: Findings) -> list[str]:
    return [f"{row.name} has no result: {row.failed}" for row in findings.rows if row.failed]


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"
