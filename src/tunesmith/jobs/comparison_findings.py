"""From the runs of a comparison to what they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.jobs.comparison_statistics import statistic_of
from tunesmith.measure.paired import interval_of, over_seeds, resampled, two_sided_p
from tunesmith.report.findings import Findings, FoundRow
from tunesmith.report.record import read_record
from tunesmith.types import LOWER_IS_BETTER

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tunesmith.jobs.run_directory import RunDirectory

WITH_HEAD = {"classification", "token_classification", "reward"}
"""Objectives whose head starts random, so that the base model by itself says nothing."""
RESAMPLES = 1000
ERROR_RESAMPLES = 50
"""For a standard error, which needs fewer than an interval's ends."""


@dataclass(frozen=True)
class Row:
    """A row with its finished runs, one a seed."""

    name: str
    method: Any
    learning_rate: float | None
    rates: dict[float, float]
    failed: str | None
    runs: list[RunDirectory]
    timed: RunDirectory | None
    """The run whose times count: one that had the machine to itself."""


def findings_of(name: str, metric: str, rows: Sequence[Row]) -> Findings:
    """Return what the runs show: the table's rows in order, with intervals and p-values."""
    higher = metric not in LOWER_IS_BETTER
    found = {row.name: _found(row, metric) for row in rows}
    measured = [row for row in rows if found[row.name].quality is not None]
    samples = _resampled(measured, metric)
    for row in measured:
        if row.name in samples:
            low, high = interval_of(samples[row.name])
            found[row.name] = replace(found[row.name], low=low, high=high)
    ranked = sorted(
        (found[row.name] for row in measured),
        key=lambda r: (-1 if higher else 1) * (r.quality or 0.0),
    )
    if ranked and ranked[0].name in samples:
        best = samples[ranked[0].name]
        ranked[1:] = [
            replace(r, p_value=two_sided_p(best - samples[r.name])) if r.name in samples else r
            for r in ranked[1:]
        ]
    failed = [found[row.name] for row in rows if found[row.name].quality is None]
    facts = _facts(measured[0].runs[0], metric) if measured else {}
    return Findings(name, metric, higher, [*_untuned(measured, metric), *ranked, *failed], facts)


def _found(row: Row, metric: str) -> FoundRow:
    """Return a row's own numbers, without comparing it."""
    summaries = [run.read_json(run.summary) for run in row.runs]
    values = [s["after"][metric] for s in summaries if metric in s["after"]]
    rates = {f"{rate:.3g}": value for rate, value in sorted(row.rates.items())}
    start = FoundRow(row.name, learning_rate=row.learning_rate, rates=rates)
    if row.failed or not values:
        return replace(start, failed=row.failed or f"{metric} was not measured")
    if diverged := values.count(None):
        many = f"{diverged} of {len(values)} seeds"
        return replace(start, failed=f"{metric} is not finite after training, with {many}")
    first = summaries[0]
    general = [s["general_loss"] for s in summaries if s.get("general_loss")]
    timed = row.timed.read_json(row.timed.summary) if row.timed else None
    return replace(
        start if timed is None else _timed(start, timed, steps=first["steps"]),
        quality=float(np.mean(values)),
        values=values,
        trainable_parameters=first["trainable_parameters"],
        total_parameters=first["total_parameters"],
        stored_bytes=first["result_bytes"],
        process_bytes=max(s["peak_process_bytes"] for s in summaries),
        device_bytes=max((s["peak_device_bytes"] or 0 for s in summaries), default=0) or None,
        general_before=_mean([g["before"] for g in general]),
        general_after=_mean([g["after"] for g in general]),
        prompt_tokens=_tokens_added(summaries),
        merges=first.get("merges"),
        steps=first["steps"],
        curve=read_record(row.runs[0].path).course("loss"),
    )


def _tokens_added(summaries: Sequence[dict[str, Any]]) -> float | None:
    """Return what the examples of a row that prompts add to a prompt, mean over its seeds."""
    return _mean([s["prompting"]["tokens_added"] for s in summaries if "prompting" in s])


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where there is nothing, or one value was not finite."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _timed(row: FoundRow, summary: dict[str, Any], *, steps: int) -> FoundRow:
    """Return a row with the times of a run that had the machine to itself."""
    a_step = summary["seconds"] / summary["steps"] if steps else None
    return replace(
        row,
        seconds_per_step=a_step,
        seconds=summary["seconds"] if a_step is None else a_step * steps,
        tokens_per_second=summary["tokens_per_second"],
        slowdown=summary.get("inference_slowdown"),
    )


def _resampled(rows: Sequence[Row], metric: str) -> dict[str, NDArray[np.float64]]:
    """Return the metric of each row on resampled evaluation rows and seeds, (resamples,)."""
    outcomes = {
        row.name: [run.read_json(run.outcomes) for run in row.runs if run.outcomes.exists()]
        for row in rows
    }
    statistics = {
        name: [s for o in each if (s := statistic_of(o, metric)) is not None]
        for name, each in outcomes.items()
    }
    lengths = {length for each in statistics.values() for _, length in each}
    if len(lengths) != 1 or not all(statistics.values()):
        return {}  # the rows were not the same, or nothing is known of each alone
    flat = [statistic for each in statistics.values() for statistic, _ in each]
    drawn = resampled(flat, lengths.pop(), resamples=RESAMPLES)
    found, start = {}, 0
    for name, each in statistics.items():
        found[name] = over_seeds(drawn[start : start + len(each)])
        start += len(each)
    return found


def standard_error(run: RunDirectory, metric: str) -> float:
    """Return the standard error of a run's metric by the bootstrap over its evaluation rows.

    0 where nothing is known of each row.
    """
    if not run.outcomes.exists():
        return 0.0
    found = statistic_of(run.read_json(run.outcomes), metric)
    if found is None or found.rows < 1:
        return 0.0
    return float(resampled([found.on], found.rows, resamples=ERROR_RESAMPLES).std())


def _untuned(rows: Sequence[Row], metric: str) -> list[FoundRow]:
    """Return the base model as it was, from a run whose method starts as exactly that."""
    for row in rows:
        summary = row.runs[0].read_json(row.runs[0].summary)
        value = summary["before"].get(metric)
        if value is not None and summary.get("identity_at_start"):
            title = "untuned, random head" if summary["objective"] in WITH_HEAD else "untuned"
            return [FoundRow(title, baseline=True, quality=value, values=[value])]
    return []


def _facts(run: RunDirectory, metric: str) -> dict[str, Any]:
    """Return what all rows have in common."""
    summary, environment = run.read_json(run.summary), run.read_json(run.environment)
    judged = statistic_of(run.read_json(run.outcomes), metric) if run.outcomes.exists() else None
    return {
        "model": summary["model"],
        "kind": summary["kind"],
        "objective": summary["objective"],
        "training rows": summary["data"]["train"]["kept"],
        "evaluation rows": summary["data"].get("evaluation", {}).get("kept"),
        "rows judged": judged.rows if judged else None,
        "hardware": summary["hardware"],
        "started": environment["started"],
        "versions": environment["versions"],
    }
