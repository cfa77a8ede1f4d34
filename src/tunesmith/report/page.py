"""One self-contained HTML page of a run: numbers, curves, replies, proofs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tunesmith.errors import CheckpointError
from tunesmith.report import words
from tunesmith.report.curves import Chart, draw
from tunesmith.report.record import Record, read_record
from tunesmith.report.template import fill

_ROLL_OUTS: Final = {
    "reward": "Reward of the replies",
    "kl": "KL to the reference (nats per reply)",
    "length": "Tokens per reply",
    "ended": "Share of replies that end by themselves",
    "value_explained": "Variance of returns that the value function explains",
}
"""What is drawn of the replies that a run learns from, and its title."""


class MetricRow(NamedTuple):
    """A metric before and after, in words."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None


class Round(NamedTuple):
    """Some replies of one roll-out."""

    title: str
    replies: list[tuple[str, str, str]]
    """Prompt, reply, and its reward in words."""


class Cell(NamedTuple):
    """How many rows of one label were taken for one label."""

    rows: int
    share: float
    """Of the rows of the true label."""
    right: bool


class ConfusionRow(NamedTuple):
    """What the rows of a true label were taken for, in the order of the labels."""

    label: str
    cells: list[Cell]


def write_report(run_dir: str | Path) -> Path:
    """Write report.html of a run directory from the files in it, and return its path.

    The page needs no network and no other file. Parts of the run that are missing are left out.

    Raises:
        CheckpointError: there is no such directory, or it cannot be written.
        DataError: a file of the run is damaged.
    """
    run_dir = Path(run_dir)
    page = render(read_record(run_dir))
    path, partial = run_dir / "report.html", run_dir / ".report.html.partial"
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    return path


def render(record: Record) -> str:
    """Return the page."""
    facts = {"Data": record.summary.get("data"), "Environment": record.environment}
    return fill(
        "page.html.jinja",
        name=record.name,
        lead=_lead(record),
        metrics=metric_rows(record),
        cards=cards(record.summary),
        charts=charts(record),
        confusion=confusion(record),
        samples=record.samples,
        rounds=rounds(record),
        proofs=record.summary.get("proofs", []),
        warnings=_warnings(record),
        facts={title: words.flat(content) for title, content in facts.items() if content},
        run_file=record.run_file,
    )


def metric_rows(record: Record) -> list[MetricRow]:
    """Return the metrics before and after; for an unfinished run, first and last evaluation."""
    before, after = record.summary.get("before", {}), record.summary.get("after", {})
    if not before and not after:
        courses = {name: points for name, points in record.evaluations().items() if points}
        before = {name: points[0][1] for name, points in courses.items()}
        after = {name: points[-1][1] for name, points in courses.items() if len(points) > 1}
    return [
        MetricRow(
            words.metric_name(name),
            words.metric(name, before.get(name)),
            words.metric(name, after.get(name)),
            words.change(name, before.get(name), after.get(name)),
            words.improved(name, before.get(name), after.get(name)),
        )
        for name in dict.fromkeys((*after, *before))
    ]


def rounds(record: Record) -> list[Round]:
    """Return replies of the first and of the last roll-out that the run learned from."""
    told = [event for event in record.of_kind("gathered") if event.get("samples")]
    return [
        Round(
            f"{place} roll-out, before step {event.get('step')}",
            [
                (
                    str(sample.get("prompt", "")),
                    str(sample.get("reply", "")),
                    words.metric("reward", sample.get("reward")),
                )
                for sample in event["samples"]
            ],
        )
        for place, event in zip(("First", "Last"), (told[:1] + told[1:][-1:]), strict=False)
    ]


def confusion(record: Record) -> list[ConfusionRow]:
    """Return the confusion matrix of a classifier after training, a row for each true label."""
    found = record.summary.get("confusion", {"labels": [], "matrix": []})
    return [
        ConfusionRow(
            label,
            [Cell(count, count / max(1, sum(row)), at == place) for at, count in enumerate(row)],
        )
        for place, (label, row) in enumerate(zip(found["labels"], found["matrix"], strict=True))
    ]


def cards(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers of a finished run as (label, value)."""
    trainable, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    share = f"{trainable / total:.2%}" if trainable and total else None
    told = (
        ("Optimiser steps", "steps", words.count),
        ("Training time", "seconds", words.duration),
        ("Tokens per second", "tokens_per_second", words.count),
        ("Supervised tokens per second", "supervised_tokens_per_second", words.count),
        ("Tokens seen", "tokens", words.count),
        ("Peak memory", "peak_memory_bytes", words.size),
        ("Parameters that train", "trainable_parameters", words.count),
        ("Saved weights", "result_bytes", words.size),
        ("Steps skipped", "skipped_steps", words.count),
    )
    shown = {
        label: show(summary[key])
        for label, key, show in told
        if summary.get(key) is not None and (key != "skipped_steps" or summary[key])
    }
    if share is not None:
        shown["Share of the base model"] = share
    return list(shown.items())


def charts(record: Record) -> list[Chart]:
    """Return the curves that the run's events have points for."""
    return list(_charts(record))


def _charts(record: Record) -> Iterator[Chart]:
    evaluations = record.evaluations()
    loss, evaluated_loss = record.course("loss"), evaluations.pop("loss", [])
    if loss or evaluated_loss:
        per_token = record.summary.get("objective", "sft") in {"sft", "distillation"}
        title = "Loss (nats per token)" if per_token else "Loss"
        yield draw(title, loss, marks=evaluated_loss, smooth=True)
    for name, points in evaluations.items():
        if len(points) > 1:
            yield draw(f"{words.metric_name(name)} in evaluation", (), marks=points)
    for key, title in _ROLL_OUTS.items():
        if points := record.gathered(key):
            yield draw(f"{title}, each roll-out", (), marks=points)
    if points := record.course("learning_rate"):
        yield draw("Learning rate", points)
    if points := record.course("grad_norm"):
        yield draw("Gradient norm before clipping", points, smooth=True, log=True)
    if points := record.course("tokens_per_second"):
        yield draw("Tokens per second", points, smooth=True)


def _lead(record: Record) -> str:
    summary = record.summary
    if not summary:
        steps = record.course("loss")
        return f"Unfinished: {len(steps)} steps recorded." if steps else "No step is recorded yet."
    method, objective = (summary.get(key, "unknown") for key in ("method", "objective"))
    stopped = summary.get("stopped_because", "finished")
    ending = "" if stopped == "finished" else f" Stopped early: {words.spaced(str(stopped))}."
    return f"{summary.get('model', 'A model')}, method {method}, objective {objective}.{ending}"


def _warnings(record: Record) -> list[str]:
    events = record.of_kind("warned", "micro_batch_halved")
    said = [f"step {event.get('step')}: {event.get('message')}" for event in events]
    return list(dict.fromkeys(said))
