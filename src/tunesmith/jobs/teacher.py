"""The teacher of a distillation: a frozen model whose word is put into every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tunesmith.errors import SpecError
from tunesmith.jobs.base import load_base
from tunesmith.models.attention import enable_segments
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.output_head import check_output_head, output_head
from tunesmith.models.precision import DTYPES, best_dtype
from tunesmith.objectives.distillation import TeacherStates, linear_head
from tunesmith.objectives.log_probs import model_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.objectives import Distillation
    from tunesmith.spec import Run
    from tunesmith.types import Batch


def teaching(run: Run, objective: Distillation, device: torch.device) -> Callable[[Batch], Batch]:
    """Return what puts the teacher's hidden states into a batch; the teacher is loaded now.

    Raises:
        SpecError: the teacher has another vocabulary, or cannot read segments side by side.
        ModelError: it cannot be loaded, or has no linear language-model head.
    """
    _require_same_tokens(run, objective)
    dtype = DTYPES.get(objective.teacher.dtype) or best_dtype(device)
    teacher = load_base(objective.teacher, device=device, dtype=dtype).requires_grad_(False).eval()
    segments = objective.teacher.attention == "auto" and enable_segments(teacher)
    check_output_head(teacher)

    def complete(batch: Batch) -> Batch:
        if "cu_seq_lens_q" in batch and not segments:
            raise SpecError(
                f"objective.teacher: the attention of {type(teacher).__name__} cannot keep samples "
                "apart that stand side by side; use engine.padding: right"
            )
        parts = output_head(teacher)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            hidden = parts.hidden_states(model_inputs(batch))
        return batch | {"teacher": TeacherStates(hidden, linear_head(parts))}

    return complete


def _require_same_tokens(run: Run, objective: Distillation) -> None:
    own, other = load_tokenizer(run.model), load_tokenizer(objective.teacher)
    if own.get_vocab() != other.get_vocab():
        raise SpecError(
            f"objective.teacher.name: {objective.teacher.name} has another vocabulary "
            f"({len(other):,} tokens) than {run.model.name} ({len(own):,}), so their distributions "
            "cannot be compared; use a teacher of the same family"
        )
