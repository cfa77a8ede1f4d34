"""The largest batch a run can meet, without its data: for plans and probes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

from tunesmith.jobs.labelled import compares
from tunesmith.jobs.teacher import require_tokens
from tunesmith.models.context import context_length
from tunesmith.objectives import (
    PPO,
    Classification,
    Distillation,
    Preference,
    TokenClassification,
)
from tunesmith.objectives.sampling import FromReplies
from tunesmith.ops.linear_divergence_top_k import outcomes
from tunesmith.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.objectives import Reward
    from tunesmith.spec import Run
    from tunesmith.types import Batch

_OF_TOKENS: Final = {"input_ids", "labels", "position_ids", "attention_mask"}


def sequences_a_row(run: Run) -> int:
    """Return the sequences of a row: a pair has two, and so has a labelled reply of kto."""
    return 2 if compares(run) and _judgement(run) in {"pairs", "labels"} else 1


def full_batch(
    run: Run, model: PreTrainedModel, shape: tuple[int, int], *, processes: int = 1
) -> Batch:
    """Return a full batch of so many rows and tokens, with what the objective reads.

    Args:
        run: what learns from it.
        model: the run's.
        shape: rows, and tokens of each of a row's sequences.
        processes: that share the texts of a step.
    """
    rows, length = shape
    objective = run.objective
    ids = torch.zeros((rows * sequences_a_row(run), length), dtype=torch.int64)
    mask, positions = torch.ones_like(ids), torch.arange(length)[None].expand(len(ids), length)
    if isinstance(objective, Classification | TokenClassification):
        labels = _labels(objective, model, ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if model.config.is_encoder_decoder:
        both = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "labels": ids}
        return both | _kept_of_teacher(run, model, ids.numel())
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    # The first token of a row is predicted by nothing.
    batch |= _kept_of_teacher(run, model, len(ids) * (length - 1))
    if isinstance(objective, FromReplies):
        texts = _texts(run, model, rows, processes=processes)
        return batch | _of_replies(objective, ids) | objective.prepared(texts)
    if compares(run):
        batch |= {"attention_mask": mask, **_judged(_judgement(run), rows, length)}
    if isinstance(objective, Preference) and objective.needs_reference:
        batch["reference"] = torch.zeros(len(ids))
    return batch


def _kept_of_teacher(run: Run, model: PreTrainedModel, positions: int) -> Batch:
    """Return what a batch holds of a teacher that spoke before training.

    Raises:
        SpecError: more of its tokens are to be kept than there are.
    """
    objective = run.objective
    if not isinstance(objective, Distillation) or objective.logits != "cached":
        return {}
    vocab = model.get_output_embeddings().weight.shape[0]
    require_tokens(objective, vocab)
    kept = outcomes(objective.top_k, vocab)
    return {
        "teacher_tokens": torch.zeros((positions, objective.top_k), dtype=torch.int32),
        "teacher_log_probs": torch.zeros((positions, kept)),
        "teacher_vocab": vocab,
    }


def _of_replies(objective: FromReplies, ids: Tensor) -> Batch:
    """Return what a batch of `tunesmith.objectives.replies` holds besides the model's inputs."""
    rows, tokens = len(ids), objective.rollout.max_new_tokens
    names = ["advantages", "old_log_probs", "reference_log_probs"]
    if isinstance(objective, PPO):
        names += ["returns", "old_values"]
    values = {name: torch.zeros(rows * tokens) for name in names}
    labels = ids.clone()
    labels[:, : ids.shape[1] - tokens] = IGNORE
    reply = torch.arange(rows).repeat_interleave(tokens)
    return {"labels": labels, "replies": rows, "reply": reply, **values}


def _texts(run: Run, model: PreTrainedModel, rows: int, *, processes: int) -> Batch:
    """Return what a batch holds of the texts that are learned from beside so many replies.

    A process has its share of a step's texts, spread evenly over its rows, and they are as long as
    `data.max_length` lets them, however short prompts and replies are.
    """
    if not run.data.pretraining:
        return {}
    objective: FromReplies = run.objective  # type: ignore[assignment]  # nobody else reads texts
    mine = math.ceil(objective.pretraining_rows / processes)
    in_step = run.train.batch_size * run.train.accumulation_steps
    length = min(run.data.max_length, context_length(model) or run.data.max_length)
    texts = torch.zeros((math.ceil(mine * rows / in_step), length), dtype=torch.int64)
    positions = torch.arange(length)[None].expand_as(texts)
    batch = {"input_ids": texts, "labels": texts, "position_ids": positions}
    return {"texts": batch, "text_scale": 1.0}


def side_by_side(batch: Batch) -> Batch:
    """Return rows as segments of one, as training lays them out where it can."""
    rows, length = batch["input_ids"].shape
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    flat = {name: value for name, value in batch.items() if name not in _OF_TOKENS}
    for name in {"input_ids", "labels"} & batch.keys():
        value = batch[name]
        of_texts = value.ndim == 1 or value.is_floating_point()
        flat[name] = value if of_texts else value.reshape(1, -1)
    if "texts" in batch:
        flat["texts"] = side_by_side(batch["texts"])
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
