"""The frozen model that preference losses compare with: the same model with its methods off."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tunesmith.data.pairs_collate import JudgedCollator
from tunesmith.jobs.base import base_fingerprint
from tunesmith.jobs.batches import over_batches
from tunesmith.jobs.teacher import teaching
from tunesmith.jobs.teacher_cache import with_teacher
from tunesmith.jobs.whole_file import ANOTHER_CACHE, whole_file
from tunesmith.models.modes import evaluating
from tunesmith.models.zoo import cache_dir
from tunesmith.objectives import Distillation, Preference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from tunesmith.data.pairs import PairCorpus, PairRow
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.methods.tuned import TunedModel
    from tunesmith.spec import Run
    from tunesmith.types import Batch

logger = logging.getLogger(__name__)

_FORMAT = "1"
"""Changes whenever the same rows and model would give other numbers."""

Table = Mapping[str, NDArray[np.float32]]
"""Log-probabilities of each row's replies, (replies,) float32, by the row's key."""


def live_reference(tuned: TunedModel, objective: Preference, batch: Batch) -> Tensor:
    """Return log p of each sequence under the base, (sequences,) float32, in eval mode."""
    with torch.no_grad(), evaluating(tuned.model), tuned.disabled():
        return objective.log_probs(tuned.model, batch)


def completion_of(run: Run, tuned: TunedModel) -> Callable[[Batch], Batch] | None:
    """Return what puts a frozen model's word into a batch that lacks it; None where none is asked.

    Batches that were made with a table of the frozen model's numbers have it already.
    """
    objective = run.objective
    if isinstance(objective, Distillation):
        live = objective.logits == "live"
        return teaching(run, objective, tuned.model.device) if live else None
    if not isinstance(objective, Preference) or not objective.needs_reference:
        return None

    def complete(batch: Batch) -> Batch:
        if "reference" in batch:
            return batch
        return batch | {"reference": live_reference(tuned, objective, batch)}

    return complete


def with_reference(
    assembled: Assembled,
    peers: Peers,
    say: Callable[[str], None] | None = None,
    *,
    training: bool = True,
) -> Assembled:
    """Return the run with log-probabilities of the frozen model in its batches, where it asks.

    They are computed once and kept by a hash of rows and base; every process calls this alike.

    Args:
        assembled: the run, whose batches know nothing of a frozen model.
        peers: the processes.
        say: told what is computed.
        training: whether batches are made of the training rows too, so that a teacher has to be
            asked about them.

    Raises:
        CheckpointError: they cannot be kept.
        SpecError: a teacher's cannot be cached; see `with_teacher`.
    """
    objective = assembled.run.objective
    if isinstance(objective, Distillation) and objective.logits == "cached":
        return with_teacher(assembled, objective, peers, say, training=training)
    if not isinstance(objective, Preference) or not objective.needs_reference:
        return assembled
    if objective.reference == "live":
        return assembled
    rows = _rows(assembled)
    path = _path(assembled, rows)
    table = _read(path, rows)
    # All compute, or none: a process that sees no file would wait for the others in vain.
    incomplete = peers.any(table is None)
    if table is None or incomplete:
        if say is not None:
            say(f"computing reference log-probabilities of {len(rows):,} rows")
        table = _computed(assembled, rows, peers)
        if peers.is_main:
            _write(path, rows, table)
    return replace(assembled, collate=judged_collator(assembled).with_reference(table))


def judged_collator(assembled: Assembled) -> JudgedCollator:
    """Return what makes batches of a run that learns from judged replies."""
    collate = assembled.collate
    assert isinstance(collate, JudgedCollator)  # noqa: S101 - such a run's rows are judged
    return collate


def _rows(assembled: Assembled) -> list[PairRow]:
    """Return every different row of training and evaluation, the longest first."""
    corpus = cast("PairCorpus", assembled.data.train.corpus)  # type: ignore[union-attr]
    every = [*corpus.rows, *cast("list[PairRow]", list(assembled.data.evaluation))]
    unique = {row.key: row for row in every}
    return sorted(unique.values(), key=lambda row: (-len(row.input_ids), row.key))


def _path(assembled: Assembled, rows: Sequence[PairRow]) -> Path:
    model = assembled.tuned.model
    facts = [_FORMAT, base_fingerprint(assembled.run.model), str(model.dtype)]
    facts += [str(assembled.autocast_dtype), assembled.run.model.attention]
    found = hashlib.sha256(" ".join([*facts, *(row.key for row in rows)]).encode())
    return cache_dir() / "reference" / f"{found.hexdigest()}.safetensors"


def _computed(
    assembled: Assembled, rows: Sequence[PairRow], peers: Peers
) -> dict[str, NDArray[np.float32]]:
    objective = cast("Preference", assembled.run.objective)
    model = assembled.tuned.model

    def log_probs(some: list[PairRow], batch: Batch) -> list[NDArray[np.float32]]:
        return by_row(some, objective.log_probs(model, batch).float())

    with assembled.tuned.disabled():
        parts = over_batches(assembled, peers, rows, log_probs)
    values = (value for part in parts for value in part)
    return {row.key: value for row, value in zip(rows, values, strict=True)}


def by_row(rows: Sequence[PairRow], values: Tensor) -> list[NDArray[Any]]:
    """Return the part of `values`, (replies of all rows,), that is of each row, on the CPU."""
    bounds = np.cumsum([len(row.segments) for row in rows])[:-1]
    return np.split(values.cpu().numpy(), bounds)


def _read(path: Path, rows: Sequence[PairRow]) -> Table | None:
    if not path.exists():
        return None
    try:
        flat = load_file(path)["log_probs"]
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("%s is damaged (%s); it is computed again", path, error)
        return None
    bounds = np.cumsum([len(row.segments) for row in rows])[:-1]
    return dict(zip((row.key for row in rows), np.split(flat, bounds), strict=True))


def _write(path: Path, rows: Sequence[PairRow], table: Table) -> None:
    with whole_file(path, instead=f"{ANOTHER_CACHE}, or use objective.reference: live") as partial:
        save_file({"log_probs": np.concatenate([table[row.key] for row in rows])}, partial)
