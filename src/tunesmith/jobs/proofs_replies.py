"""Checks before a run learns from its own replies: that sampling, training and reference agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from tunesmith.data.asked import AskedData
from tunesmith.engine.evaluation import measuring
from tunesmith.jobs.experience_lessons import OLD, lessons_of
from tunesmith.jobs.experience_written import sampled, stops_of
from tunesmith.jobs.proofs_pairs import start_tolerance
from tunesmith.models.modes import autocasting
from tunesmith.objectives.sampling import FromReplies
from tunesmith.rollout.draw import row_seeds
from tunesmith.rollout.sample import sample
from tunesmith.types import Proof

if TYPE_CHECKING:
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled

PROMPTS: Final = 4
TOKENS: Final = 16
LARGEST_GAP: Final = 1e-4
"""Between log-probabilities in float32, in nats."""


def sampling_agrees(assembled: Assembled, peers: Peers) -> Proof:
    """The log-probabilities of sampled tokens are those that training computes.

    In float32 to 1e-4; in bfloat16 the gap is told, and ratios use the training side's.
    """
    data, objective = assembled.data, assembled.run.objective
    assert isinstance(data, AskedData)  # noqa: S101 - both are of a run that samples
    assert isinstance(objective, FromReplies)  # noqa: S101
    prompts = [asked.input_ids for asked in data.train.peek(PROMPTS)]
    dtype, settings = assembled.autocast_dtype, objective.rollout
    seeds = row_seeds(assembled.run.seed, range(-len(prompts), 0))
    most = min(TOKENS, settings.max_new_tokens)
    if settings.decoding == "vllm":
        few = settings.model_copy(update={"max_new_tokens": most})
        replies = sampled(assembled, peers, prompts, seeds, few)
    else:
        with autocasting(peers.device, dtype):
            replies = sample(
                assembled.tuned.model,
                prompts,
                seeds,
                max_new_tokens=most,
                stops=stops_of(assembled, settings),
                pad_token_id=assembled.facts.pad_token_id,
                decoding=settings.decoding,
            )
    trained = lessons_of(assembled, peers).log_probs(prompts, [reply.tokens for reply in replies])
    gap = max(
        abs(one - other)
        for reply, values in zip(replies, trained, strict=True)
        for one, other in zip(reply.log_probs, values[OLD].tolist(), strict=True)
    )
    exact = assembled.tuned.model.dtype == torch.float32 and dtype is None
    plain = exact and assembled.run.model.quantize == "none"
    count = sum(len(reply.tokens) for reply in replies)
    detail = f"largest difference {gap:.1e} nats over {count} tokens"
    detail += f" (allowed: {LARGEST_GAP:g})" if plain else " (told, not judged, in this precision)"
    return Proof("sampling agrees with training", gap <= LARGEST_GAP or not plain, detail)


def policy_starts_at_reference(assembled: Assembled, peers: Peers) -> Proof:
    """With the method off the model is the reference, and the policy starts there."""
    name = "policy starts at the reference"
    if not all(part.attachment.identity_at_start for part in assembled.tuned.parts):
        return Proof(name, True, "not promised by this method")
    data, model = assembled.data, assembled.tuned.model
    assert isinstance(data, AskedData)  # noqa: S101 - of a run that samples
    ids = torch.tensor([data.train.peek(1)[0].input_ids], device=peers.device)
    dtype = assembled.autocast_dtype
    with measuring(model), autocasting(peers.device, dtype):
        on = model(input_ids=ids).logits
        with assembled.tuned.disabled():
            off = model(input_ids=ids).logits
    gap = float((on - off).abs().max())
    allowed = start_tolerance(assembled) * float(off.abs().max())
    return Proof(name, gap <= allowed, f"largest difference of logits {gap:.1e}")
