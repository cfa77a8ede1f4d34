"""Several roles of one backbone: adapters that act one at a time, and a reward model among them.

The policy is the base with its own adapter, the reference is the base alone, and a reward model is
the base with the adapter of a reward run and its head: one model in memory for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from tunesmith.errors import AdapterError
from tunesmith.methods.adapter_files import base_name, base_of, read_adapters
from tunesmith.methods.head import split_head
from tunesmith.methods.parts import Part
from tunesmith.methods.saved import attach_saved, require_base
from tunesmith.models.heads import last_tokens
from tunesmith.models.modes import evaluating
from tunesmith.models.output_head import output_head

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tunesmith.methods.adapter_files import SavedAdapter
    from tunesmith.methods.tuned import TunedModel
    from tunesmith.types import Batch

SCORED_AT_ONCE: Final = 16
"""Texts that a reward model reads side by side."""
_SHOWN: Final = 60
"""Characters of a template in a message."""
_CONTEXT: Final = 20
"""Of them, those that are still alike."""


@contextmanager
def acting(tuned: TunedModel, *names: str) -> Iterator[None]:
    """Let exactly the adapters called `names` act inside a `with` block; none is the base.

    Raises:
        MethodError: there is no adapter of that name, or two fight over a base parameter.
    """
    before = {attachment: attachment.enabled for attachment in tuned.attachments}
    tuned.use(names)
    try:
        yield
    finally:
        tuned.switch(before)


class RewardScorer:
    """The reward model of a finished run beside a policy, on the policy's own backbone.

    Args:
        tuned: the policy; the reward run's adapter is added under `name`, frozen and off.
        directory: the reward run's saved adapter, with its head and tokenizer.
        tokenizer: the policy's, which has to be the reward run's too.
        name: of the adapter.

    Raises:
        AdapterError: the run was trained on another base or template (both are named), or saved no
            reward head.
        MethodError: an adapter of this name is there already.
    """

    def __init__(
        self,
        tuned: TunedModel,
        directory: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward",
    ) -> None:
        place = Path(directory)
        saved = read_adapters(place)
        _require_same_template(place, tokenizer)
        self.tuned, self.tokenizer, self.name = tuned, tokenizer, name
        head: dict[str, Tensor] | None = None
        for adapter in saved:
            require_same_base(adapter, tuned)
            plain, own = split_head(adapter)
            head = own or head
            self._put(plain)
        self.weight, self.bias = _scalar_head(place, head)
        tuned.enable(False, name)
        tuned.freeze(name)

    def _put(self, adapter: SavedAdapter) -> None:
        tuned = self.tuned
        with tuned.attaching():
            part = attach_saved(adapter, tuned.model, tuned.sites, name=self.name)
            tuned.put(Part(self.name, *part))

    @torch.no_grad()
    def rewards(self, batch: Batch) -> Tensor:
        """Return the reward of each text of a batch, (texts,) float32, on the model's device.

        Args:
            batch: padded rows with attention_mask (on either side), or segments side by side; whole
                texts, prompt and reply with its end-of-turn, as the reward run's rows were.
        """
        backbone = output_head(self.tuned.model).backbone
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with evaluating(self.tuned.model), acting(self.tuned, self.name):
            hidden = backbone(**inputs, use_cache=False).last_hidden_state
        last = hidden[last_tokens(batch)].float()
        bias = None if self.bias is None else self.bias.to(last.device)
        return F.linear(last, self.weight.to(last.device), bias)[:, 0]

    def score(
        self, texts: Sequence[str] | Sequence[Sequence[int]], *, batch_size: int = SCORED_AT_ONCE
    ) -> list[float]:
        """Return a reward for each text, or for each list of token ids, in their order.

        Texts are conversations as the chat template writes them and get no further tokens.
        """
        ids = [
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if isinstance(text, str)
            else list(text)
            for text in texts
        ]
        found: list[float] = []
        for start in range(0, len(ids), batch_size):
            found += self.rewards(self._padded(ids[start : start + batch_size])).tolist()
        return found

    def _padded(self, rows: Sequence[Sequence[int]]) -> Batch:
        device, length = self.tuned.model.device, max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        filled = [[*row, *([pad] * (length - len(row)))] for row in rows]
        real = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        mask = torch.tensor(real, device=device)
        return {
            "input_ids": torch.tensor(filled, device=device),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        }


def require_same_base(adapter: SavedAdapter, tuned: TunedModel) -> None:
    """Check that a reward run's adapter belongs to the policy's base.

    Raises:
        AdapterError: it does not; both are named.
    """
    base = base_of(tuned.model, tuned.sites)
    try:
        require_base(adapter, base, check_name=True)
    except AdapterError as error:
        raise AdapterError(
            f"{adapter.directory}: this reward run was trained on {base_name(adapter)!r} and the "
            f"policy stands on {base.name!r}; they share one backbone, so train the reward model "
            "on the same model.name and model.adapter"
        ) from error


def _require_same_template(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    own = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if own.chat_template != tokenizer.chat_template or own.get_vocab() != tokenizer.get_vocab():
        what = "chat template" if own.chat_template != tokenizer.chat_template else "vocabulary"
        theirs, ours = _shown(own, tokenizer), _shown(tokenizer, own)
        raise AdapterError(
            f"{directory}: this reward run was trained with another {what} ({theirs}) than the "
            f"policy's ({ours}); set the same model.chat_template and model.tokenizer for both"
        )


def _shown(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """Return what of a tokenizer is not the other's: its template from where they part, or size."""
    one, two = str(tokenizer.chat_template), str(other.chat_template)
    if one == two:
        return f"{len(tokenizer):,} tokens"
    alike = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    start = max(0, (min(len(one), len(two)) if alike is None else alike) - _CONTEXT)
    return repr(one[start : start + _SHOWN])


def _scalar_head(directory: Path, head: dict[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """Return the weight (1, width) and bias (1,) of a reward head, float32."""
    weight = next((t for n, t in (head or {}).items() if n.endswith("score.weight")), None)
    if weight is None or weight.shape[0] != 1:
        raise AdapterError(
            f"{directory} holds no scalar head of a decoder; expected the adapter of a run with "
            "objective: {name: reward}"
        )
    bias = next((t for n, t in (head or {}).items() if n.endswith("score.bias")), None)
    return weight.float(), None if bias is None else bias.float()
