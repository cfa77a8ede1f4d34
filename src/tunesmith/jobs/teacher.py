"""The teacher of a distillation: a frozen model whose word is put into every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from tunesmith.errors import ModelError, SpecError
from tunesmith.jobs.base import load_base
from tunesmith.models.attention import enable_segments
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.output_head import check_output_head, output_head
from tunesmith.models.precision import DTYPES, best_dtype
from tunesmith.objectives.distillation import TeacherStates, linear_head
from tunesmith.objectives.log_probs import model_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from tunesmith.objectives import Distillation
    from tunesmith.spec import Run
    from tunesmith.types import Batch


class Teacher(NamedTuple):
    """A teacher in memory."""

    model: PreTrainedModel
    segments: bool
    """Whether its attention keeps samples apart that stand side by side."""

    def states(self, batch: Batch) -> TeacherStates:
        """Return what the teacher makes of a batch on its device.

        Raises:
            SpecError: the batch has samples side by side, and it would mix them.
        """
        if "cu_seq_lens_q" in batch and not self.segments:
            raise SpecError(
                f"objective.teacher: the attention of {type(self.model).__name__} cannot keep "
                "samples apart that stand side by side; use engine.padding: right"
            )
        parts = output_head(self.model)
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            hidden = parts.hidden_states(model_inputs(batch))
        return TeacherStates(hidden, linear_head(parts))


def teaching(run: Run, objective: Distillation, device: torch.device) -> Callable[[Batch], Batch]:
    """Return what puts the teacher's hidden states into a batch; the teacher is loaded now.

    Raises:
        SpecError: the teacher has another vocabulary.
        ModelError: it cannot be loaded, or has no linear language-model head.
    """
    require_same_tokens(run, objective)
    teacher = load_teacher(objective, device)
    return lambda batch: batch | {"teacher": teacher.states(batch)}


def load_teacher(objective: Distillation, device: torch.device) -> Teacher:
    """Return the objective's teacher on `device`, frozen.

    Raises:
        ModelError: it cannot be loaded, or has no linear language-model head.
    """
    dtype = teacher_dtype(objective, device)
    model = load_base(objective.teacher, device=device, dtype=dtype).requires_grad_(False).eval()
    check_output_head(model)
    return Teacher(model, objective.teacher.attention == "auto" and enable_segments(model))


def teacher_dtype(objective: Distillation, device: torch.device) -> torch.dtype:
    """Return what the teacher's weights are loaded in."""
    return DTYPES.get(objective.teacher.dtype) or best_dtype(device)


def require_same_tokens(run: Run, objective: Distillation) -> None:
    """Check that both models' distributions are over the same tokens.

    Raises:
        SpecError: they are not.
        ModelError: there is no teacher of that name.
    """
    own = load_tokenizer(run.model)
    try:
        other = load_tokenizer(objective.teacher)
    except ModelError as error:  # which speaks of model.name
        raise ModelError(f"objective.teacher: {error}") from error
    if own.get_vocab() != other.get_vocab():
        raise SpecError(
            f"objective.teacher.name: {objective.teacher.name} has another vocabulary "
            f"({len(other):,} tokens) than {run.model.name} ({len(own):,}), so their distributions "
            "cannot be compared; use a teacher of the same family"
        )


def require_tokens(objective: Distillation, vocab: int) -> None:
    """Check that a distribution has as many tokens as are to be kept of it.

    Raises:
        SpecError: it has not.
    """
    if objective.top_k > vocab:
        raise SpecError(
            f"objective.top_k: {objective.top_k:,} tokens are more than the {vocab:,} there are; "
            "use at most that many, or far fewer"
        )
