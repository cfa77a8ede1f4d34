"""What the policies of a chain reply to held-out prompts, and what the judge thinks of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tunesmith.data.asked import TurnsAsked
from tunesmith.data.collate import Collator
from tunesmith.data.converted import all_converted
from tunesmith.data.formats import renamed
from tunesmith.data.pairs_rows import replies_of
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RawRow, TokenRow
from tunesmith.data.sources import locate
from tunesmith.engine.distribution import connect
from tunesmith.engine.evaluation import measuring
from tunesmith.errors import DataError
from tunesmith.jobs.assemble import choose_dtypes
from tunesmith.jobs.base import load_base
from tunesmith.models.chat import prepare_tokenizer
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.modes import autocasting
from tunesmith.objectives.log_probs import reply_log_probs
from tunesmith.rewards.contract import Scored, prompt_text
from tunesmith.rollout.draw import Drawing
from tunesmith.rollout.sample import Reply, Stops, sample

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.data.rows import Values
    from tunesmith.data.settings import Source
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.result import LoadedRun
    from tunesmith.models.settings import ModelSettings
    from tunesmith.spec import Run


class JudgedPrompt(NamedTuple):
    """A prompt whose replies are judged, and the pair of replies that its row has."""

    messages: tuple[dict[str, Any], ...]
    """The turns before the reply."""
    columns: dict[str, Any]
    """The row as its file has it."""
    input_ids: list[int]
    pair: tuple[TokenRow, TokenRow] | None = None
    """The row's better and worse reply, where it has both and they differ."""
    tools: tuple[dict[str, Any], ...] | None = None
    """The row's tools, as templates take them."""

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
    gains: list[float] | None
    """Of each prompt with a pair: by how much log p - log q of the better reply exceeds that of
    the worse one, in nats: what DPO and its relatives call the difference of implicit rewards."""
    leads: list[float] | None
    """Of each prompt with a pair: by how much log p a token of the better reply exceeds that of the
    worse one."""


class Writing(NamedTuple):
    """How replies are written."""

    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int


def held_out_prompts(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    limit: int | None,
    *,
    setting: str = "judged.prompts",
) -> list[JudgedPrompt]:
    """Return the different prompts of the sources, in their order; `setting` is what names those.

    Raises:
        DataError: a row cannot be read or asks nothing, or there are fewer than two prompts.
    """
    different: dict[tuple[int, ...], JudgedPrompt] = {}
    for asked in _prompts(sources, Renderer(tokenizer)):
        different.setdefault(tuple(asked.input_ids), asked)
        if len(different) == limit:
            break
    if len(different) < 2:
        raise DataError(f"{setting}: found {len(different)} prompts; expected two or more")
    return list(different.values())


def _prompts(sources: Sequence[Source], renderer: Renderer) -> Iterator[JudgedPrompt]:
    for source in sources:
        located = locate(source)
        asked = partial(_asked, TurnsAsked(located), source, renderer)
        yield from all_converted(located, asked)


def _asked(turns: TurnsAsked, source: Source, renderer: Renderer, raw: RawRow) -> JudgedPrompt:
    asked = turns(raw.values)
    pair = _pair(renamed(raw.values, source.columns), source, renderer)
    return JudgedPrompt(asked.messages, raw.values, renderer.asked(asked), pair, asked.tools)


def _pair(row: Values, source: Source, renderer: Renderer) -> tuple[TokenRow, TokenRow] | None:
    if "chosen" not in row or "rejected" not in row:
        return None
    better, worse = (renderer.row(reply) for reply in replies_of(row, source))
    return None if np.array_equal(better.input_ids, worse.input_ids) else (better, worse)


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
        model = load_base(run.model, device=peers.device, dtype=dtypes.weights).eval()
        tokenizer = load_tokenizer(run.model)
        return cls(model, tokenizer, run.model, dtypes.autocast(mixed=False))

    def write(
        self, prompts: Sequence[Sequence[int]], how: Writing, seeds: Sequence[int]
    ) -> list[Reply]:
        """Return a reply to each prompt."""
        stops = prepare_tokenizer(self.tokenizer, self.settings).end_of_turn_ids
        with autocasting(self.model.device, self.autocast_dtype):
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


def said_by(loaded: LoadedRun, asked: Sequence[JudgedPrompt], how: Writing, *, tuned: bool) -> Said:
    """Return what is replied, and for a tuned policy how far it is from where it started."""
    prompts = [one.input_ids for one in asked]
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
    judged = [reply for one in asked if one.pair is not None for reply in one.pair]
    compared = _compared(loaded, asking, rows, judged, batch_size=how.batch_size, tuned=tuned)
    return Said(
        [said_text(loaded.tokenizer, reply.tokens) for reply in replies],
        [len(reply.tokens) for reply in replies],
        [reply.ended for reply in replies],
        *compared,
    )


class _Compared(NamedTuple):
    divergences: list[float] | None
    gains: list[float] | None
    leads: list[float] | None


def _compared(
    loaded: LoadedRun,
    asking: Asking,
    rows: Sequence[TokenRow],
    judged: Sequence[TokenRow],
    *,
    batch_size: int,
    tuned: bool,
) -> _Compared:
    """Return what `Said` holds of the policy's replies and of pairs, better and worse in turn."""
    every, own = [*rows, *judged], len(rows)
    with nullcontext() if tuned else loaded.tuned.disabled():
        p = _log_probs(asking, every, batch_size, loaded.peers)
    means = p[own:] / [int(row.supervised.sum()) for row in judged]
    leads = (means[0::2] - means[1::2]).tolist() if judged else None
    if not tuned:
        return _Compared(None, None, leads)
    with loaded.tuned.disabled():
        ratios = p - _log_probs(asking, every, batch_size, loaded.peers)
    gains = (ratios[own::2] - ratios[own + 1 :: 2]).tolist() if judged else None
    return _Compared(ratios[:own].tolist(), gains, leads)


def said_text(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """Return a reply's text, without what ends the turn."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return str(text).strip()


def seeds_of(seed: int, count: int, *, first: int = 0) -> list[int]:
    """Return a seed for each of `count` rows from row `first` on, all different, 64 bits each."""
    numbers = ((seed << 32) + number for number in range(first, first + count))
    # Signed, as tensors hold them, whatever seed the user chose.
    return [(number + 2**63) % 2**64 - 2**63 for number in numbers]


def _log_probs(
    asking: Asking, rows: Sequence[TokenRow], batch_size: int, peers: Peers
) -> NDArray[np.float64]:
    collate = Collator(asking.tokenizer.pad_token_id, "right")
    sums: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = peers.to_device(collate(list(rows[start : start + batch_size])))
        with measuring(asking.model), autocasting(asking.model.device, asking.autocast_dtype):
            sums += reply_log_probs(asking.model, batch).sums.float().cpu().tolist()
    return np.array(sums)
