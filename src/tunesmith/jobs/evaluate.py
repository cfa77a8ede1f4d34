"""Evaluating a finished run, on its own or on other data, beside the untuned model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.assemble import assembled_from
from tunesmith.jobs.examine_labels import examiner_of
from tunesmith.jobs.examine_replies import ReplyExaminer
from tunesmith.jobs.labelled import read_data
from tunesmith.jobs.reference import with_reference
from tunesmith.jobs.result import load_run
from tunesmith.jobs.run_directory import write_json
from tunesmith.objectives.sampling import FromReplies

if TYPE_CHECKING:
    from tunesmith.data.prepare import PreparedData
    from tunesmith.data.settings import DataSettings, Source
    from tunesmith.jobs.result import LoadedRun


def evaluate(
    path: str | Path,
    *,
    data: str | None = None,
    base: bool = True,
    overrides: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """Return the metrics of a run's result under "tuned", and of the untuned model under "base".

    They are also written to evaluation.json in the run directory.

    Args:
        path: the run directory.
        data: evaluate on this file, folder or name instead, laid out like the run's own data.
        base: whether to measure the untuned model as well.
        overrides: settings over those of the run, such as `evaluation.limit=100`.

    Raises:
        DataError: there are no evaluation rows.
        SpecError: the untuned model is wanted, and the run's method keeps none.
    """
    loaded = load_run(path, overrides)
    if base and not loaded.tuned.keeps_base:
        raise SpecError(
            f"{path}: with method.keep_base: false there is no untuned model to evaluate as well; "
            "use --no-base (base=False)"
        )
    prepared = _prepare(loaded, data)
    assembled = assembled_from(loaded, prepared)
    assembled = with_reference(assembled, loaded.peers, training=False)
    replies = isinstance(loaded.run.objective, FromReplies)
    examiner = (ReplyExaminer if replies else examiner_of)(assembled, loaded.peers)
    if not examiner.has_rows:
        raise DataError("data.evaluation: the run has no evaluation rows; name a file with --data")
    metrics = {}
    if base:
        with loaded.tuned.disabled():
            metrics["base"] = examiner.examine()
    metrics["tuned"] = examiner.examine()
    if loaded.peers.is_main:
        write_json(loaded.directory.evaluation, {"data": data, "metrics": metrics})
    return metrics


def _prepare(loaded: LoadedRun, data: str | None) -> PreparedData:
    run = loaded.run
    if data is not None:
        run = run.model_copy(update={"data": _pointed_at(run.data, data)})
    return read_data(run, loaded.tokenizer)[1]


def _pointed_at(settings: DataSettings, data: str) -> DataSettings:
    """Return settings that evaluate on `data`, read as the run's own data are."""
    like: Source = (settings.evaluation or settings.train)[0]
    source = like.model_copy(update={"path": data, "split": None, "skip": 0, "limit": None})
    return settings.model_copy(update={"evaluation": [source], "holdout": 0})
