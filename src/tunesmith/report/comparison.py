"""One self-contained HTML page of a comparison, and its table for the terminal and Markdown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from tunesmith.errors import CheckpointError
from tunesmith.report import words
from tunesmith.report.curves import Chart
from tunesmith.report.findings import SIGNIFICANT, Findings, FoundRow
from tunesmith.report.recommendation import recommendation
from tunesmith.report.scatter import Dot, draw_costs, draw_curves
from tunesmith.report.template import fill

_NONE: Final = "\u2013"


class Column(NamedTuple):
    """A column of the table."""

    title: str
    shown: Callable[[Findings, FoundRow], str | None]
    """What it says of a row; None where that was not measured."""


def columns(findings: Findings) -> list[str]:
    """Return the table's headings: the rows' names, and what was measured of any row."""
    return ["", *(column.title for column in _measured(findings))]


def cells(findings: Findings, row: FoundRow) -> list[str]:
    """Return one row of the table, without its name."""
    chosen = _measured(findings)
    if row.failed:
        return [_NONE] * len(chosen)
    return [column.shown(findings, row) or _NONE for column in chosen]


def _measured(findings: Findings) -> list[Column]:
    quality = Column(
        words.metric_name(findings.metric), lambda f, row: words.metric(f.metric, row.quality)
    )
    others = (c for c in _COLUMNS if any(c.shown(findings, row) for row in findings.rows))
    return [quality, *others]


def _interval(findings: Findings, row: FoundRow) -> str | None:
    if row.low is None or row.high is None:
        return None
    return " to ".join(words.metric(findings.metric, end) for end in (row.low, row.high))


def _inference(_: Findings, row: FoundRow) -> str | None:
    """Return the slowdown as trained, and merged where that differs."""
    shown = _if_known(row.slowdown, lambda s: f"{s:.2f} x")
    return f"{shown} (merged 1 x)" if row.merges and shown is not None else shown


def _if_known(value: float | None, show: Callable[[float], str]) -> str | None:
    return None if value is None else show(value)


_COLUMNS: Final = (
    Column("95 % interval", _interval),
    Column("p", lambda _, row: _if_known(row.p_value, "{:.3f}".format)),
    Column("trains", lambda _, row: _if_known(row.trainable_parameters, words.count)),
    Column("share", lambda _, row: _if_known(row.share, "{:.2%}".format)),
    Column("stored", lambda _, row: _if_known(row.stored_bytes, words.size)),
    Column("peak memory", lambda _, row: _if_known(row.peak_bytes, words.size)),
    Column("s/step", lambda _, row: _if_known(row.seconds_per_step, "{:.3f}".format)),
    Column("tokens/s", lambda _, row: _if_known(row.tokens_per_second, words.count)),
    Column("inference", _inference),
    Column("forgetting", lambda _, row: _if_known(row.forgetting, "{:+.3f}".format)),
    Column("longer prompt", lambda _, row: _if_known(row.prompt_tokens, "{:,.0f} tokens".format)),
    Column("learning rate", lambda _, row: _if_known(row.learning_rate, "{:.2g}".format)),
)


def write_comparison_report(findings: Findings, path: Path) -> Path:
    """Write the page, which needs no network and no other file.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(render(findings), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    return path


def render(findings: Findings) -> str:
    """Return the page."""
    equal = {row.name for row in findings.as_good_as_best()} if len(findings.trained) > 1 else set()
    return fill(
        "comparison.html.jinja",
        name=findings.name,
        lead=_lead(findings),
        recommendation=recommendation(findings),
        columns=columns(findings),
        table=[
            {
                "name": row.name,
                "failed": row.failed,
                "cells": cells(findings, row),
                "as_good": row.name in equal,
            }
            for row in findings.rows
        ],
        note=_note(findings),
        charts=charts(findings),
        rates=[
            (row.name, ", ".join(f"{rate}: {value:.4g}" for rate, value in row.rates.items()))
            for row in findings.rows
            if row.rates
        ],
        facts=words.flat(findings.facts),
    )


def charts(findings: Findings) -> list[Chart]:
    """Return quality against each cost, and the learning curves."""
    quality = words.metric_name(findings.metric)
    drawn = []
    for title, axis, cost in _COSTS:
        dots = [
            Dot(row.name, float(price), float(row.quality or 0.0), row.low, row.high)
            for row in findings.trained
            if (price := cost(row)) is not None
        ]
        if len(dots) > 1:
            drawn.append(
                draw_costs(
                    f"{quality} against {title}",
                    dots,
                    cost=axis,
                    quality=quality,
                    higher_is_better=findings.higher_is_better,
                )
            )
    curves = {row.name: row.curve for row in findings.trained if row.curve}
    return [*drawn, draw_curves("Training loss", curves)] if curves else drawn


Cost = Callable[[FoundRow], float | None]
_COSTS: Final[tuple[tuple[str, str, Cost], ...]] = (
    (
        "parameters that train",
        "parameters that train",
        lambda row: row.trainable_parameters or None,
    ),
    ("peak memory", "peak memory (MiB)", lambda row: _mebibytes(row.peak_bytes)),
    ("time", "seconds in training steps", lambda row: row.seconds or None),
    ("size stored", "stored a task (MiB)", lambda row: _mebibytes(row.stored_bytes)),
    ("forgetting", "rise of the loss on general text (nats)", lambda row: row.forgetting),
)


def _mebibytes(num_bytes: int | None) -> float | None:
    """Return bytes in MiB; None where there are none, which has no place on a logarithmic axis."""
    return num_bytes / 2**20 if num_bytes else None


def _lead(findings: Findings) -> str:
    facts, seeds = findings.facts, max((len(r.values) for r in findings.trained), default=0)
    steps = sorted({row.steps for row in findings.trained if row.steps})
    span = f"{steps[0]:,} steps" if len(steps) == 1 else "equal time"
    return (
        f"{facts.get('model', 'A model')}, {len(findings.trained)} ways to tune it, {span} and "
        f"{seeds} seed{'s' * (seeds != 1)} each, judged by {words.metric_name(findings.metric)}."
    )


def _note(findings: Findings) -> str:
    """Return how to read the columns that are there."""
    shown = columns(findings)
    said = [
        _chance(findings),
        f"Marked rows cannot be told from the best (p >= {SIGNIFICANT}).",
        *(_EXPLAINED[title] for title in shown if title in _EXPLAINED),
        findings.facts.get("remark", ""),
    ]
    return " ".join(said)


def _chance(findings: Findings) -> str:
    """Return what was drawn again for the intervals."""
    drawn = "evaluation rows" if findings.one_seed else "evaluation rows and seeds"
    return f"Intervals and p-values come from the paired bootstrap over {drawn}."


_EXPLAINED: Final = {
    "inference": "Inference is the time of a forward pass over the plain base's; a merged model is "
    "a plain one again, so merging, where a method can, brings it to 1 x.",
    "forgetting": "Forgetting is the rise of the loss (nats a token) on general text.",
    "longer prompt": "Rows that end in -shot train nothing: the untrained model is asked, with so "
    "many examples of the training data before each prompt.",
}
"""What a heading means, where that is not plain."""
