"""What the policies of a chain reply to held-out prompts, and what the judge thinks of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tunesmith.data.collate import Collator
from tunesmith.data.conversation import Conversation
from tunesmith.data.formats import layout_of
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RawRow, TokenRow
from tunesmith.data.sources import locate, read
from tunesmith.engine.distribution import connect
from tunesmith.engine.evaluation import measuring
from tunesmith.errors import DataError
from tunesmith.jobs.assemble import choose_dtypes
from tunesmith.models.chat import prepare_tokenizer
from tunesmith.models.loading import load_model
from tunesmith.objectives.log_probs import reply_log_probs
from tunesmith.rewards.contract import Scored, prompt_text
from tunesmith.rollout.draw import Drawing
from tunesmith.rollout.sample import Reply, Stops, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.data.settings import Source
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.result import LoadedRun
    from tunesmith.models.settings import ModelSettings
    from tunesmith.spec import Run


class Asked(NamedTuple):
    """One held-out prompt."""

    messages: tuple[dict[str, Any], ...]
    """The turns before the reply."""
    columns: dict[str, Any]
    """The row as its file has it."""
    input_ids: list[int]

    def scored(self, reply: str) -> Scored:
        """Return what a reward is asked of a reply."""
        return Scored(prompt_text(self.messages), reply, self.columns, self.messages)


class Said(NamedTuple):
    """What a policy replied to all prompts."""

    replies: list[str]
    lengths: list[int]
    """Tokens of each reply."""
    ended: list[bool]
    """Whether it ended by itself, and not because it was full."""
    divergences: list[float] | None
    """log p(reply) - log q(reply) in nats, under the policy and under what it started from."""


class Writing(NamedTuple):
    """How replies are written."""

    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int


def held_out_prompts(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, limit: int | None
) -> list[Asked]:
    """Return the different prompts of the sources, in their order.

    Raises:
        DataError: a row cannot be read or asks nothing, or there are fewer than two prompts.
    """
    different: dict[tuple[int, ...], Asked] = {}
    for asked in _prompts(sources, Renderer(tokenizer)):
        different.setdefault(tuple(asked.input_ids), asked)
        if len(different) == limit:
            break
    if len(different) < 2:
        raise DataError(f"judged.prompts: found {len(different)} prompts; expected two or more")
    return list(different.values())


def _prompts(sources: Sequence[Source], renderer: Renderer) -> Iterator[Asked]:
    for source in sources:
        located = locate(source)
        layout = layout_of(located)
        for raw in read(located):
            if not isinstance(raw, RawRow):
                raise DataError(raw.message)
            try:
                told = layout.convert(raw.values)
                prompt = renderer.prompt(told)
            except DataError as error:
                raise DataError(f"{raw.place}: {error}") from None
            if prompt is None or not isinstance(told, Conversation):
                raise DataError(f"{raw.place}: asks nothing that a policy could reply to")
            yield Asked(tuple(prompt.messages), raw.values, prompt.input_ids)


class Asking(NamedTuple):
    """A model that is asked, and what its replies are written with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    settings: ModelSettings
    autocast_dtype: torch.dtype | None

    @classmethod
    def of(cls, run: Run) -> Asking:
        """Return the model that a run starts from, on the run's device."""
        peers = connect(run.engine)
        dtypes = choose_dtypes(run, peers.device)
        model, tokenizer = load_model(run.model, device=peers.device, dtype=dtypes.weights)
        model.eval()
        return cls(model, tokenizer, run.model, dtypes.autocast(mixed=False))

    def write(
        self, prompts: Sequence[Sequence[int]], how: Writing, seeds: Sequence[int]
    ) -> list[Reply]:
        """Return a reply to each prompt."""
        stops = prepare_tokenizer(self.tokenizer, self.settings).end_of_turn_ids
        with _autocast(self):
            return sample(
                self.model,
                prompts,
                seeds,
                max_new_tokens=how.max_new_tokens,
                stops=Stops(frozenset(stops)),
                pad_token_id=self.tokenizer.pad_token_id,
                drawing=Drawing(how.temperature),
                batch_size=how.batch_size,
            )


def said_by(
    loaded: LoadedRun, prompts: Sequence[Sequence[int]], how: Writing, *, tuned: bool
) -> Said:
    """Return what is replied, and for a tuned policy how far it is from where it started."""
    asking = Asking(loaded.tuned.model, loaded.tokenizer, loaded.run.model, loaded.autocast_dtype)
    with nullcontext() if tuned else loaded.tuned.disabled():
        replies = asking.write(prompts, how, seeds_of(how.seed, len(prompts)))
    rows = [
        TokenRow(
            np.array([*prompt, *reply.tokens], np.int32),
            np.arange(len(prompt) + len(reply.tokens)) >= len(prompt),
            (len(prompt) + len(reply.tokens),),
        )
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    divergences = None
    if tuned:
        p = _log_probs(asking, rows, how.batch_size, loaded.peers)
        with loaded.tuned.disabled():
            q = _log_probs(asking, rows, how.batch_size, loaded.peers)
        divergences = [one - other for one, other in zip(p, q, strict=True)]
    return Said(
        [said_text(loaded.tokenizer, reply.tokens) for reply in replies],
        [len(reply.tokens) for reply in replies],
        [reply.ended for reply in replies],
        divergences,
    )


def said_text(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """Return a reply's text, without what ends the turn."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return str(text).strip()


def seeds_of(seed: int, count: int, *, first: int = 0) -> list[int]:
    """Return a seed for each of `count` rows from row `first` on, all different."""
    return [(seed << 32) + number for number in range(first, first + count)]


def _log_probs(
    asking: Asking, rows: Sequence[TokenRow], batch_size: int, peers: Peers
) -> list[float]:
    collate = Collator(asking.tokenizer.pad_token_id, "right")
    sums: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = peers.to_device(collate(list(rows[start : start + batch_size])))
        with measuring(asking.model), _autocast(asking):
            sums += reply_log_probs(asking.model, batch).sums.float().cpu().tolist()
    return sums


def _autocast(asking: Asking) -> contextlib.AbstractContextManager[object]:
    dtype = asking.autocast_dtype
    return torch.autocast(
        asking.model.device.type, dtype or torch.bfloat16, enabled=dtype is not None
    )
