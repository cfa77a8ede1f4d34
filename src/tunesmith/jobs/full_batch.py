"""The largest batch a run can meet, without its data: for plans and probes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from tunesmith.errors import SpecError
from tunesmith.jobs.labelled import compares
from tunesmith.objectives import Classification, Distillation, Preference, TokenClassification
from tunesmith.objectives.sampling import FromReplies

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.objectives import Reward
    from tunesmith.spec import Run
    from tunesmith.types import Batch

_OF_TOKENS: Final = {"input_ids", "labels", "position_ids", "attention_mask"}


def require_batch(run: Run) -> None:
    """Check that what a step takes can be known without data and other models.

    Raises:
        SpecError: it cannot.
    """
    name = run.objective.name
    if isinstance(run.objective, FromReplies):
        raise SpecError(
            f"objective.name: {name} learns from replies that the model has yet to write, and what "
            "writing and learning take is not planned; plan the same run with objective.name: sft, "
            "which is the least that it needs"
        )
    if isinstance(run.objective, Distillation):
        raise SpecError(
            f"objective.name: {name} has a teacher beside the model, which is not planned; plan "
            "the same run with objective.name: sft, which is all but the teacher"
        )


def sequences_a_row(run: Run) -> int:
    """Return the sequences of a row: a pair has two, and so has a labelled reply of kto."""
    return 2 if compares(run) and _judgement(run) in {"pairs", "labels"} else 1


def full_batch(run: Run, model: PreTrainedModel, shape: tuple[int, int]) -> Batch:
    """Return a full batch of so many rows and tokens, with what the objective reads."""
    rows, length = shape
    objective = run.objective
    ids = torch.zeros((rows * sequences_a_row(run), length), dtype=torch.int64)
    mask, positions = torch.ones_like(ids), torch.arange(length)[None].expand(len(ids), length)
    if isinstance(objective, Classification | TokenClassification):
        labels = _labels(objective, model, ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "labels": ids}
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    if compares(run):
        batch |= {"attention_mask": mask, **_judged(_judgement(run), rows, length)}
    if isinstance(objective, Preference) and objective.needs_reference:
        batch["reference"] = torch.zeros(len(ids))
    return batch


def side_by_side(batch: Batch) -> Batch:
    """Return rows as segments of one, as training lays them out where it can."""
    rows, length = batch["input_ids"].shape
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    flat = {name: value for name, value in batch.items() if name not in _OF_TOKENS}
    for name in {"input_ids", "labels"} & batch.keys():
        value = batch[name]
        of_texts = value.ndim == 1 or value.is_floating_point()
        flat[name] = value if of_texts else value.reshape(1, -1)
    return flat | {
        "position_ids": torch.arange(length).repeat(rows)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds.clone(),
        "max_length_q": length,
        "max_length_k": length,
    }


def _labels(
    objective: Classification | TokenClassification, model: PreTrainedModel, ids: Tensor
) -> Tensor:
    if isinstance(objective, TokenClassification):
        return ids
    if objective.kind == "single":
        return ids[:, 0]
    shape = (len(ids), model.config.num_labels) if objective.kind == "multi" else (len(ids),)
    return torch.zeros(shape)


def _judgement(run: Run) -> str:
    objective: Preference | Reward = run.objective  # type: ignore[assignment]  # it compares
    return objective.judgement


def _judged(judgement: str, rows: int, length: int) -> Batch:
    first, second = torch.arange(0, 2 * rows, 2), torch.arange(1, 2 * rows, 2)
    if judgement == "pairs":
        pairs = {"winners": first, "losers": second}
        return {**pairs, "margins": torch.zeros(rows), "pair_weights": torch.ones(rows)}
    if judgement == "labels":
        good = torch.ones(rows, dtype=torch.bool)
        return {"matched": first, "mismatched": second, "good": good}
    if judgement == "scores":
        return {"scores": torch.zeros(rows)}
    return {
        "step_sequences": torch.arange(rows),
        "step_positions": torch.full((rows,), length - 1),
        "step_labels": torch.ones(rows),
    }
