"""Distillation: a small model learns a large one's whole distribution over each next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator

from tunesmith.models.output_head import OutputHead, output_head
from tunesmith.models.settings import ModelSettings
from tunesmith.objectives.contract import Objective
from tunesmith.objectives.log_probs import model_inputs
from tunesmith.objectives.sampling import Sampling
from tunesmith.objectives.sft import next_tokens
from tunesmith.ops.linear_cross_entropy import linear_cross_entropy
from tunesmith.ops.linear_divergence import Divergence, LinearHead, linear_divergence
from tunesmith.ops.linear_divergence_top_k import TopK, linear_divergence_top_k
from tunesmith.types import IGNORE, LossTerms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.types import Batch


class TeacherStates(NamedTuple):
    """What the teacher makes of a batch."""

    hidden: Tensor
    """(batch, length, teacher's width)."""
    head: LinearHead


class SampleDivergences(NamedTuple):
    """What each sample of a batch adds to the loss and the divergence."""

    nats: Tensor
    """(samples,) float32: its summed loss."""
    tokens: Tensor
    """(samples,) int64: its supervised tokens."""
    divergence: Tensor
    """(samples,) float32: its summed divergence, detached."""


class _Supervised(NamedTuple):
    """What both models make of supervised positions, in their order."""

    hidden: Tensor
    """(tokens, width) of the student."""
    targets: Tensor
    """(tokens,) int64."""
    teacher: tuple[Tensor, ...]
    """(tokens, ...) each: the teacher's states, or the two parts of what was kept of it."""

    def cut(self, tokens: list[int]) -> list[_Supervised]:
        """Return the parts of so many positions each, in order."""
        own = zip(torch.split(self.hidden, tokens), torch.split(self.targets, tokens), strict=True)
        known = zip(*(torch.split(kept, tokens) for kept in self.teacher), strict=True)
        return [_Supervised(*part, kept) for part, kept in zip(own, known, strict=True)]


class Distillation(Objective):
    """Minimise the divergence from a teacher at the tokens of given replies, or of own ones."""

    name: Literal["distillation"] = "distillation"
    """Learn from a teacher model."""
    teacher: ModelSettings
    """The teacher, with the same vocabulary; frozen."""
    logits: Literal["live", "cached"] = "live"
    """live runs the teacher beside the student in every step; cached runs it once, before training,
    keeps the top_k likeliest tokens of its every distribution on disk, and trains without it."""
    top_k: int = Field(default=64, ge=1)
    """cached: tokens that are kept of a distribution, in 8 bytes each; all others count as one."""
    divergence: Divergence = "forward_kl"
    """forward_kl covers all that the teacher may say, reverse_kl keeps to what it says mostly, js
    lies between (beta)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """js: towards 0 it is like forward_kl, towards 1 like reverse_kl."""
    temperature: float = Field(default=1.0, gt=0)
    """Both models' logits are divided by it, and the divergence is multiplied by its square, so
    that gradients keep their size (Hinton et al. 2015, sec. 2)."""
    label_weight: float = Field(default=0.0, ge=0, lt=1)
    """Share of the usual cross-entropy of the given replies in the loss."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps whose replies the student writes itself, as it is then, instead of the
    given ones (lambda of Agarwal et al. 2023, alg. 1)."""
    sampling: Sampling = Sampling()
    """on_policy: how the student writes them."""

    head: ClassVar[Literal["causal_lm"]] = "causal_lm"

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.beta != type(self).model_fields["beta"].default and self.divergence != "js":
            raise ValueError(f"beta mixes two divergences, and divergence {self.divergence} is one")
        if self.top_k != type(self).model_fields["top_k"].default and self.logits != "cached":
            raise ValueError("top_k is what is kept of cached logits; set logits: cached")
        if self.on_policy == 0:
            if self.sampling != Sampling():
                raise ValueError(
                    "sampling is of replies that the student writes; set on_policy above 0"
                )
        elif self.logits == "cached":
            raise ValueError(
                "logits: cached is what a teacher said beforehand, and the student's replies are "
                "not yet written then; set logits: live, or on_policy: 0"
            )
        elif self.label_weight:
            raise ValueError("label_weight is of given replies only; set it or on_policy to 0")
        return self

    def loss(self, model: PreTrainedModel, batch: Batch) -> LossTerms:
        """Return the summed loss in nats and the number of supervised tokens.

        Args:
            model: the student.
            batch: with `teacher`, the teacher's TeacherStates of the same batch, or with what was
                kept of them; see `tunesmith.types.HEAD_ONLY`.

        Raises:
            ModelError: the model has no linear language-model head.
        """
        parts = output_head(model)
        return self._terms(self._supervised(parts, batch), parts, batch)

    def loss_by_sample(
        self, model: PreTrainedModel, batch: Batch
    ) -> tuple[LossTerms, SampleDivergences]:
        """Return what `loss` does, and each sample's share of it, in the order of the samples."""
        parts = output_head(model)
        tokens = _tokens_by_sample(batch)
        samples = self._supervised(parts, batch).cut(tokens)
        terms = [self._terms(sample, parts, batch) for sample in samples]
        nats = torch.stack([one.total for one in terms])
        apart = torch.stack([one.metrics["divergence"] for one in terms])
        return (
            LossTerms(nats.sum(), sum(tokens), {"divergence": apart.sum()}),
            SampleDivergences(nats, torch.tensor(tokens), apart),
        )

    def _supervised(self, parts: OutputHead, batch: Batch) -> _Supervised:
        """Run the student, and return what is known where it is to predict something."""
        targets = next_tokens(batch).flatten()
        places = (targets != IGNORE).nonzero().squeeze(-1)
        hidden = parts.hidden_states(model_inputs(batch)).flatten(0, 1)[places]
        teacher: tuple[Tensor, ...]
        if self.logits == "cached":
            teacher = (batch["teacher_tokens"], batch["teacher_log_probs"])
        else:
            teacher = (batch["teacher"].hidden.flatten(0, 1)[places],)
        return _Supervised(hidden, targets[places], teacher)

    def _terms(self, at: _Supervised, parts: OutputHead, batch: Batch) -> LossTerms:
        """Return the summed loss over some supervised positions of a batch."""
        apart = self._apart(at, linear_head(parts), batch)
        total = (1 - self.label_weight) * self.temperature**2 * apart
        if self.label_weight:
            total = total + self.label_weight * linear_cross_entropy(
                at.hidden,
                parts.weight,
                at.targets,
                bias=parts.scaled_bias(),
                softcap=parts.softcap,
            )
        return LossTerms(total, len(at.targets), {"divergence": apart.detach()})

    def _apart(self, at: _Supervised, head: LinearHead, batch: Batch) -> Tensor:
        """Return the summed divergence at these positions."""
        how: dict[str, Any] = {
            "kind": self.divergence,
            "beta": self.beta,
            "temperature": self.temperature,
        }
        if self.logits == "cached":
            known, vocab = TopK(*at.teacher), batch["teacher_vocab"]
            return linear_divergence_top_k(at.hidden, head, known, vocab=vocab, **how)
        (states,) = at.teacher
        return linear_divergence(at.hidden, head, states, batch["teacher"].head, **how)

    def count(self, batch: Batch) -> int:
        """Return the number of supervised tokens."""
        return int((next_tokens(batch) != IGNORE).sum())


def linear_head(parts: OutputHead) -> LinearHead:
    """Return a model's head as the divergence takes it."""
    return LinearHead(parts.weight, parts.scaled_bias(), parts.softcap)


def _tokens_by_sample(batch: Batch) -> list[int]:
    """Return the supervised tokens of each sample, rows or segments, of a batch."""
    supervised = (next_tokens(batch) != IGNORE).cpu()
    samples: Sequence[Tensor] = supervised.unbind()
    if "cu_seq_lens_q" in batch:
        inner = batch["cu_seq_lens_q"][1:-1].cpu()  # where tensor_split wants it
        samples = supervised.flatten().tensor_split(inner.long())
    return [int(sample.sum()) for sample in samples]
