"""The feature-based approach: a frozen model's embeddings, and a plain classifier over them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from tunesmith.engine.distribution import connect
from tunesmith.errors import SpecError
from tunesmith.jobs.environment import environment
from tunesmith.jobs.examine import judged_rows
from tunesmith.jobs.examine_labels import JudgedClasses, judge_classes
from tunesmith.jobs.features_classify import Fitted, Integers, fit, require_classifiers
from tunesmith.jobs.features_embed import Embedder
from tunesmith.jobs.features_spec import FeatureRun
from tunesmith.jobs.labelled import class_weights, head_of_run, read_data
from tunesmith.jobs.run_directory import RunDirectory, check_free, clear, write_json, write_text
from tunesmith.jobs.summary import without_steps
from tunesmith.models.chat import prepare_tokenizer
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.skeleton import kind_of, skeleton
from tunesmith.objectives import Classification
from tunesmith.report.page import write_report

if TYPE_CHECKING:
    from tunesmith.data.classification import LabelledCorpus, LabelledRow
    from tunesmith.spec import Run
    from tunesmith.types import JSON

Say = Callable[[str], None]


@dataclass(frozen=True)
class FeatureResult:
    """What such a run leaves."""

    fitted: Fitted
    directory: RunDirectory
    summary: dict[str, JSON]
    """The evidence."""


def learn_from_features(job: FeatureRun, say: Say, *, overwrite: bool = False) -> FeatureResult:
    """Embed the run's texts, fit the classifier, measure it, and write the run directory.

    A linear classifier is written as `classifier.safetensors`. One of trees is not written: the
    only format scikit-learn has for it is a pickle, which can run code when it is read; the
    features are cached, so the run file makes the same trees again.

    Args:
        job: what to do.
        say: told in a line what is done.
        overwrite: delete what an earlier run of this name left.

    Raises:
        TunesmithError: its kind says what is wrong; nothing is written then but the cache.
    """
    started = time.perf_counter()
    run = job.run.resolved()
    _check(run)
    require_classifiers()
    peers = connect(run.engine)
    if peers.size > 1:
        raise SpecError("features works in one process; start it without torchrun")
    directory = check_free(run, resume=False, overwrite=overwrite)
    tokenizer = load_tokenizer(run.model, chats=False)
    facts = prepare_tokenizer(tokenizer, run.model, chats=False)
    run, data = read_data(run, tokenizer)
    for line in data.train_report.lines():
        say(line)
    embedder = Embedder(FeatureRun(run, job.features), data, peers, facts.pad_token_id, say)
    learned = _learn(embedder, say)
    summary = _summary(embedder, learned, wall_seconds=time.perf_counter() - started)
    _write(embedder, learned, summary, directory)
    for name, value in learned.metrics.items():
        low, high = cast("dict[str, list[float]]", learned.evidence["intervals"])[name]
        say(f"{name} {value:.3f} (95 % interval {low:.3f} to {high:.3f})")
    if learned.fitted.linear is None:
        say(f"{job.features.classifier} is not saved: its only format, a pickle, can run code")
    say(f"result: {directory.path}")
    return FeatureResult(learned.fitted, directory, summary)


@dataclass(frozen=True)
class _Learned:
    """What came of the fit."""

    fitted: Fitted
    rows: int
    width: int
    """Of the features."""
    seconds: float
    """For features and fit."""
    metrics: dict[str, float]
    """On the evaluation rows; none where there are no such rows."""
    outcomes: dict[str, JSON]
    evidence: dict[str, JSON]


def _check(run: Run) -> None:
    """Refuse what features cannot learn.

    Raises:
        SpecError: it is no classification with one label a text, or asks for what nothing does.
    """
    objective = run.objective
    if not isinstance(objective, Classification) or objective.kind != "single":
        kind = f" with kind {objective.kind}" if isinstance(objective, Classification) else ""
        raise SpecError(
            f"objective: features learns one label a text, and this is {objective.name}{kind}; use "
            "{name: classification}, or `tunesmith train`"
        )
    if objective.label_smoothing:
        raise SpecError("objective.label_smoothing: no classifier of features has it; leave it out")
    if run.data.mixing == "weighted":
        raise SpecError(
            "data.mixing: weighted: features reads every row once; use concatenate, and "
            "objective.class_weights where classes should count otherwise"
        )


def _learn(embedder: Embedder, say: Say) -> _Learned:
    """Return the classifier, fitted to the training rows and measured on the others."""
    started = time.perf_counter()
    run, data, settings = embedder.job.run, embedder.prepared, embedder.job.features
    rows = cast("LabelledCorpus", data.train.corpus).rows  # type: ignore[union-attr]
    others = cast("Sequence[LabelledRow]", judged_rows(data.evaluation, run.evaluation))
    features = embedder.features(rows)
    other_features = embedder.features(others) if others else None
    labels, weights = _labels(run), class_weights(run, data)
    say(f"fitting {settings.classifier} to {len(rows):,} rows of {features.shape[1]} features")
    fitted = fit(
        settings,
        features,
        _targets(rows),
        labels=labels,
        class_weights=None if weights is None else weights.numpy(),
        seed=run.seed,
    )
    seconds = time.perf_counter() - started
    judged = JudgedClasses({}, {}, {})
    if other_features is not None:
        judged = judge_classes(_targets(others), fitted.predict(other_features), labels)
    return _Learned(
        fitted,
        len(rows),
        features.shape[1],
        seconds,
        judged.metrics,
        judged.outcomes,
        judged.evidence,
    )


def _labels(run: Run) -> Sequence[str]:
    head = head_of_run(run)
    assert head is not None  # noqa: S101 - `_check` let classifications through only
    return head.labels


def _targets(rows: Sequence[LabelledRow]) -> Integers:
    return np.array([row.target for row in rows], dtype=np.int64)


def _summary(embedder: Embedder, learned: _Learned, *, wall_seconds: float) -> dict[str, JSON]:
    """Return summary.json: training's keys, as far as they mean something without steps."""
    run, device, fitted = embedder.job.run, embedder.peers.device, learned.fitted
    backbone = skeleton(run.model, head=head_of_run(run)).base_model
    return {
        **without_steps(run, embedder.prepared, device),
        "method": "features",
        "kind": kind_of(backbone.config),
        "features": {
            "pooling": embedder.pooling,
            "width": learned.width,
            "classifier": embedder.job.features.classifier,
            "C": fitted.C,
        },
        "after": dict(learned.metrics),
        "seconds": round(learned.seconds, 2),
        "wall_seconds": round(wall_seconds, 2),
        "tokens": embedder.tokens,
        "tokens_per_second": round(embedder.tokens / max(learned.seconds, 1e-9), 1),
        "trainable_parameters": fitted.coefficients,
        "total_parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        **learned.evidence,
    }


def _write(
    embedder: Embedder, learned: _Learned, summary: dict[str, JSON], directory: RunDirectory
) -> None:
    run, linear = embedder.job.run, learned.fitted.linear
    clear(directory)
    directory.begin(run)
    write_text(directory.spec, embedder.job.to_yaml())
    write_json(directory.environment, environment(run.seed))
    summary["result_bytes"] = None
    if linear is not None:
        linear.save(directory.classifier, labels=_labels(run), pooling=embedder.pooling)
        summary["result_bytes"] = directory.classifier.stat().st_size
    if learned.outcomes:
        write_json(directory.outcomes, learned.outcomes)
    write_json(directory.summary, summary)  # before the report, which shows it
    write_report(directory.path)
