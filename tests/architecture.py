"""What the tests know of an architecture: how to build it, and how its inputs are made."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

PAD = 2
"""Id of padding in all tiny models; no token of the tests has it."""
NEW_TOKENS = 20


@dataclass(frozen=True)
class Architecture(ABC):
    """One tiny random model, and what follows from its kind."""

    make: Callable[[], PreTrainedModel]
    """Builds the model: eval mode, float32, no dropout."""
    kind: ClassVar[Literal["decoder", "encoder", "seq2seq"]]

    @abstractmethod
    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """Return what the model is called with for `ids` (batch, length), without padding."""

    @abstractmethod
    def padded(self, rows: Sequence[Tensor]) -> dict[str, Any]:
        """Return one batch of rows of unequal length."""

    @abstractmethod
    def tokens(self, out: Tensor, length: int) -> Tensor:
        """Return the part of one row's output (padded length, ...) that is no padding."""

    def loss(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Return a loss () whose gradient differs at every position."""
        return model(**self.inputs(ids), labels=ids).loss

    def packed(self, rows: Sequence[Tensor]) -> dict[str, Any]:
        """Return all rows in one, each a segment."""
        lengths = [len(row) for row in rows]
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return {
            "input_ids": torch.cat(list(rows))[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }

    def generated(self, model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
        """Return what `generate` gives, greedily and with its cache: (batch, length)."""
        batch = self.padded(rows)
        return model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
        )

    @abstractmethod
    def step_by_step(self, model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
        """Return the same by a full forward pass for every token, without a cache."""


class Decoder(Architecture):
    """Reads and writes one sequence; padded on the left, as `generate` wants it."""

    kind = "decoder"

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        return {"input_ids": ids}

    def padded(self, rows: Sequence[Tensor]) -> dict[str, Any]:
        ids, mask = _pad(rows, left=True)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def tokens(self, out: Tensor, length: int) -> Tensor:
        return out[-length:]

    @torch.no_grad()
    def step_by_step(self, model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
        for _ in range(NEW_TOKENS):
            out = model(**self.padded(rows), use_cache=False, logits_to_keep=1)
            new = out.logits[:, -1].argmax(-1, keepdim=True)
            rows = [torch.cat(pair) for pair in zip(rows, new, strict=True)]
        return self.padded(rows)["input_ids"]


class Encoder(Architecture):
    """Reads one sequence both ways; padded on the right."""

    kind = "encoder"

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def padded(self, rows: Sequence[Tensor]) -> dict[str, Any]:
        ids, mask = _pad(rows, left=False)
        return {"input_ids": ids, "attention_mask": mask}

    def tokens(self, out: Tensor, length: int) -> Tensor:
        return out[:length]

    def step_by_step(self, model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError


class EncoderDecoder(Encoder):
    """Reads one sequence and writes another; both are padded on the right."""

    kind = "seq2seq"

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        return super().inputs(ids) | {"decoder_input_ids": ids.flip(-1)}

    def padded(self, rows: Sequence[Tensor]) -> dict[str, Any]:
        written, _ = _pad([row.flip(-1) for row in rows], left=False)
        return super().padded(rows) | {"decoder_input_ids": written}

    @torch.no_grad()
    def step_by_step(self, model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
        batch = super().padded(rows)
        written = torch.full((len(rows), 1), model.config.decoder_start_token_id)
        for _ in range(NEW_TOKENS):
            out = model(**batch, decoder_input_ids=written, use_cache=False)
            written = torch.cat([written, out.logits[:, -1:].argmax(-1)], dim=1)
        return written


def _pad(rows: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, (rows, longest)."""
    length = max(len(row) for row in rows)
    padding = [row.new_full((length - len(row),), PAD) for row in rows]
    pairs = [(p, r) if left else (r, p) for p, r in zip(padding, rows, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(length)
    kept = places >= length - lengths if left else places < lengths
    return torch.stack([torch.cat(pair) for pair in pairs]), kept.long()
