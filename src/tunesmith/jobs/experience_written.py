"""Replies of the policy with what they are worth, written by all processes together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tunesmith.engine.compiled import compiles
from tunesmith.jobs.batches import interleave
from tunesmith.jobs.served_policy import served_replies
from tunesmith.objectives.sampling import FromReplies
from tunesmith.rewards.contract import Scored
from tunesmith.rollout.draw import Drawing, row_seeds
from tunesmith.rollout.sample import Reply, Stops, sample

if TYPE_CHECKING:
    from tunesmith.data.asked import Asked
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.objectives.sampling import Sampling
    from tunesmith.rewards.build import WeightedSum


@dataclass(frozen=True, eq=False)
class Written:
    """One reply."""

    asked: Asked
    reply: list[int]
    """Its tokens, at least one."""
    sampled_log_probs: list[float]
    """Of the tokens, by the forward that sampled them."""
    ended: bool
    """Whether it ended by itself."""
    text: str
    score: float
    """The weighted sum of its rewards."""
    parts: dict[str, float]
    """Each reward."""


def written(
    assembled: Assembled,
    peers: Peers,
    reward: WeightedSum,
    prompts: Sequence[Asked],
    *,
    numbers: range,
    greedy: bool = False,
) -> list[Written]:
    """Return a reply to each prompt, each process having written and scored its share.

    Args:
        assembled: the run; its policy is the model as it is now.
        peers: every process calls this alike.
        reward: what replies are worth.
        prompts: the same in every process.
        numbers: of the replies in the run, which decide their seeds.
        greedy: take the most likely tokens instead of sampling.

    Raises:
        RewardError: a reply cannot be scored, and its reward stops at that.
    """
    seeds = row_seeds(assembled.run.seed, numbers)
    mine = list(prompts)[peers.rank :: peers.size]
    objective = assembled.run.objective
    assert isinstance(objective, FromReplies)  # noqa: S101 - nobody else's are scored
    found = sampled(
        assembled,
        peers,
        [asked.input_ids for asked in mine],
        seeds[peers.rank :: peers.size],
        objective.rollout,
        greedy=greedy,
    )
    return interleave(peers.gather(_scored(assembled, reward, mine, found)))


def sampled(  # noqa: PLR0917 - who writes, what to, and how
    assembled: Assembled,
    peers: Peers,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    settings: Sampling,
    *,
    greedy: bool = False,
) -> list[Reply]:
    """Return the replies of the run's policy, as it is now, to this process's prompts.

    Raises:
        TunesmithError: a prompt leaves no room, or the policy cannot be sampled as `settings` say.
    """
    dtype = assembled.autocast_dtype
    drawing = Drawing(0.0 if greedy else settings.temperature, settings.top_p, settings.top_k)
    stops = stops_of(assembled, settings)
    if settings.decoding == "vllm":
        return served_replies(assembled, peers, prompts, seeds, settings, drawing, stops)
    with torch.autocast(peers.device.type, dtype) if dtype else nullcontext():
        return sample(
            assembled.tuned.model,
            prompts,
            seeds,
            max_new_tokens=settings.max_new_tokens,
            stops=stops,
            pad_token_id=assembled.facts.pad_token_id,
            drawing=drawing,
            batch_size=settings.batch_size,
            decoding=settings.decoding,
            compiled=compiles(assembled.run.engine, peers.device, sharded=False),
        )


def stops_of(assembled: Assembled, settings: Sampling) -> Stops:
    """Return what ends a reply of this run."""
    tokenizer = assembled.tokenizer
    return Stops(
        frozenset(assembled.facts.end_of_turn_ids),
        tuple(settings.stop),
        lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True),
    )


def _scored(
    assembled: Assembled, reward: WeightedSum, mine: Sequence[Asked], found: Sequence[Reply]
) -> list[Written]:
    texts = [assembled.tokenizer.decode(t, skip_special_tokens=True) for t, _, _ in found]
    rows = [
        Scored(asked.text, text, asked.columns, asked.messages)
        for asked, text in zip(mine, texts, strict=True)
    ]
    parts = reward.parts(rows) if rows else {}
    scores = reward.total(parts) if rows else []
    return [
        Written(
            asked,
            tokens,
            log_probs,
            ended,
            text,
            score,
            {name: values[index] for name, values in parts.items()},
        )
        for index, (asked, (tokens, log_probs, ended), text, score) in enumerate(
            zip(mine, found, texts, scores, strict=True)
        )
    ]
