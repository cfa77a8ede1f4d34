"""One self-contained HTML page of a comparison, and its table for the terminal and Markdown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tunesmith.errors import CheckpointError
from tunesmith.report import words
from tunesmith.report.curves import Chart
from tunesmith.report.findings import SIGNIFICANT, Findings, FoundRow
from tunesmith.report.recommendation import recommendation
from tunesmith.report.scatter import Dot, draw_costs, draw_curves
from tunesmith.report.template import fill

_NONE: Final = "\u2013"


def columns(findings: Findings) -> list[str]:
    """Return the table's headings."""
    general = ["forgetting"] if any(r.forgetting is not None for r in findings.rows) else []
    prompt = ["longer prompt"] if any(r.prompt_tokens is not None for r in findings.rows) else []
    return [
        "",
        words.metric_name(findings.metric),
        "95 % interval",
        "p",
        "trains",
        "share",
        "stored",
        "peak memory",
        "s/step",
        "tokens/s",
        "inference",
        *general,
        *prompt,
        "learning rate",
    ]


def cells(findings: Findings, row: FoundRow) -> list[str]:
    """Return one row of the table, without its name."""
    if row.failed:
        return [_NONE] * (len(columns(findings)) - 1)
    interval = _NONE
    if row.low is not None and row.high is not None:
        low, high = (words.metric(findings.metric, end) for end in (row.low, row.high))
        interval = f"{low} to {high}"
    shown = columns(findings)
    general = [_or(row.forgetting, lambda f: f"{f:+.3f}")] if "forgetting" in shown else []
    prompt = (
        [_or(row.prompt_tokens, lambda n: f"{n:,.0f} tokens")] if "longer prompt" in shown else []
    )
    return [
        words.metric(findings.metric, row.quality),
        interval,
        _or(row.p_value, lambda p: f"{p:.3f}"),
        _or(row.trainable_parameters, words.count),
        _or(row.share, lambda share: f"{share:.2%}"),
        _or(row.stored_bytes, words.size),
        _or(row.peak_bytes, words.size),
        _or(row.seconds_per_step, lambda s: f"{s:.3f}"),
        _or(row.tokens_per_second, words.count),
        _inference(row),
        *general,
        *prompt,
        _or(row.learning_rate, lambda r: f"{r:.2g}"),
    ]


def _inference(row: FoundRow) -> str:
    """Return the slowdown as trained, and merged where that differs."""
    shown = _or(row.slowdown, lambda s: f"{s:.2f} x")
    return f"{shown} (merged 1 x)" if row.merges and row.slowdown is not None else shown


def _or(value: float | None, show: Any) -> str:
    return _NONE if value is None else str(show(value))


def markdown(findings: Findings) -> str:
    """Return the table in Markdown."""
    head = columns(findings)
    rows = ([row.name, *cells(findings, row)] for row in findings.rows)
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    why = "".join(f"\n- {row.name}: {row.failed}" for row in findings.rows if row.failed)
    return table + ("\n" + why if why else "")


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
            if (price := cost(row))
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
    ("parameters that train", "parameters that train", lambda row: row.trainable_parameters),
    ("peak memory", "peak memory (MiB)", lambda row: (row.peak_bytes or 0) / 2**20),
    ("time", "seconds in training steps", lambda row: row.seconds),
    ("size stored", "stored a task (MiB)", lambda row: (row.stored_bytes or 0) / 2**20),
)


def _lead(findings: Findings) -> str:
    facts, seeds = findings.facts, max((len(r.values) for r in findings.trained), default=0)
    steps = sorted({row.steps for row in findings.trained if row.steps})
    span = f"{steps[0]:,} steps" if len(steps) == 1 else "equal time"
    return (
        f"{facts.get('model', 'A model')}, {len(findings.trained)} ways to tune it, {span} and "
        f"{seeds} seed{'s' * (seeds != 1)} each, judged by {words.metric_name(findings.metric)}."
    )


def _note(findings: Findings) -> str:
    general = (
        " Forgetting is the rise of the loss (nats a token) on general text."
        if "forgetting" in columns(findings)
        else ""
    )
    prompt = (
        " Rows that end in -shot train nothing: the untrained model is asked, with so many "
        "examples of the training data before each prompt."
        if "longer prompt" in columns(findings)
        else ""
    )
    return (
        "Intervals and p-values come from the paired bootstrap over evaluation rows and seeds; "
        f"marked rows cannot be told from the best (p >= {SIGNIFICANT}). Inference is the time of "
        f"a forward pass over the plain base's; a merged model is a plain one again, so merging, "
        f"where a method can, brings it to 1 x.{general}{prompt}"
    )
