"""Checks of runs that learn from judged replies: where they start, and that replies stay apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

from tunesmith.engine.evaluation import measuring
from tunesmith.jobs.reference import judged_collator
from tunesmith.models.modes import autocasting
from tunesmith.objectives import Preference, Reward
from tunesmith.types import Proof

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.data.rows import TokenRow
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.types import LossTerms

CLOSE: Final = 1e-3
"""How far float32 may be off, in nats: sums over some hundred tokens in batches of other shapes."""
CLOSE_OTHERWISE: Final = 5e-2


def starts_at_reference(
    assembled: Assembled, rows: Sequence[TokenRow], peers: Peers
) -> list[Proof]:
    """At step 0 policy and reference are one: DPO's loss is ln 2 and the reward margin is 0."""
    objective = assembled.run.objective
    if not isinstance(objective, Preference) or not objective.needs_reference:
        return []
    if not assembled.tuned.identity_at_start:
        return [Proof("policy starts at the reference", True, "not promised by this method")]
    terms = _terms(assembled, rows, peers)
    loss, expected = float(terms.total) / terms.count, objective.loss_at_reference
    name = "signed_reward" if objective.loss_type == "kto" else "reward_margin"
    margin = float(terms.metrics[name]) / terms.count
    allowed = CLOSE if is_exact(assembled) else CLOSE_OTHERWISE
    passed = abs(margin) <= allowed
    detail = f"{name.replace('_', ' ')} {margin:.1e}"
    if expected is not None:
        passed &= abs(loss - expected) <= allowed * max(1.0, abs(expected))
        detail = f"loss {loss:.6f} where {objective.loss_type} gives {expected:.6f}, {detail}"
    if not passed:
        detail += "; the reference is of another base: empty the cache's folder `reference`"
    return [Proof("policy starts at the reference", passed, detail)]


def replies_apart(assembled: Assembled, rows: Sequence[TokenRow], peers: Peers) -> Proof:
    """A reply's log-probability, or its reward, is the same alone and among others."""
    together = _of_replies(assembled, rows, peers)
    apart = torch.cat([_of_replies(assembled, [row], peers) for row in rows])
    scale = apart.abs().clamp(min=1.0)
    difference = float(((together - apart).abs() / scale).max())
    allowed = 1e-4 if is_exact(assembled) else 5e-2
    kind = "side by side without padding" if assembled.padding_free else "padded"
    detail = f"{len(together)} replies {kind} differ by {difference:.1e} from what they are alone"
    return Proof("replies do not see each other", difference <= allowed, detail)


def start_tolerance(assembled: Assembled) -> float:
    """Return what share a model may differ from its base by before the first step.

    Float32 copies of bfloat16 weights round elsewhere; a hook that adds zero does not.

    A GPU adds up over a sequence in no fixed order, so that not even two equal passes are alike.
    """
    if assembled.autocast_dtype is not None:
        return 2e-2
    return 0.0 if assembled.program.model.device.type == "cpu" else 1e-5


def is_exact(assembled: Assembled) -> bool:
    """Return whether a row gives the same in batches of all shapes, but for rounding in float32.

    int8 picks the columns that it multiplies unrounded over all rows of a batch; float8 turns the
    last bits of an input, in which orders of sums differ, into a code's step now and then.
    """
    settings = assembled.run.model
    if settings.quantize == "int8" or settings.multiplies_float8:
        return False
    return assembled.program.model.dtype == torch.float32 and assembled.autocast_dtype is None


def _terms(assembled: Assembled, rows: Sequence[TokenRow], peers: Peers) -> LossTerms:
    batch = peers.to_device(judged_collator(assembled)(rows))
    with measuring(assembled.program), autocasting(peers.device, assembled.autocast_dtype):
        terms: LossTerms = assembled.program(batch)
    return terms


def _of_replies(assembled: Assembled, rows: Sequence[TokenRow], peers: Peers) -> Tensor:
    """Return a number of each reply of `rows`, (replies,) float32."""
    objective, model = assembled.run.objective, assembled.tuned.model
    batch = peers.to_device(judged_collator(assembled)(rows))
    with measuring(assembled.program), autocasting(peers.device, assembled.autocast_dtype):
        if isinstance(objective, Reward):
            return objective.rewards(model, batch).float().cpu()
        assert isinstance(objective, Preference)  # noqa: S101 - no other learns from judged replies
        return objective.log_probs(model, batch).float().cpu()
