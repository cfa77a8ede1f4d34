"""From replies and their scores to rows to learn from: log-probabilities, values, advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tunesmith.data.collate_replies import ReplyRow, reply_row
from tunesmith.engine.evaluation import measuring
from tunesmith.jobs.batches import interleave
from tunesmith.objectives.advantages import (
    EPS,
    AdaptiveKL,
    generalised_advantages,
    kl_estimate,
    whitened,
)
from tunesmith.objectives.grpo import GRPO
from tunesmith.objectives.ppo import PPO
from tunesmith.objectives.replies import approximate_kl, policy_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.jobs.experience_written import Written
    from tunesmith.types import JSON, Batch

OLD: Final = "old_log_probs"
REFERENCE: Final = "reference_log_probs"
Values = dict[str, "NDArray[np.float32]"]


@dataclass
class Lessons:
    """Makes rows of replies as the run's objective wants them."""

    assembled: Assembled
    peers: Peers
    kl: AdaptiveKL
    _seen: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0], init=False)
    """Of all scores so far: their number, mean, and squared distances from it."""

    @property
    def objective(self) -> PPO | GRPO:
        """The run's objective."""
        objective = self.assembled.run.objective
        assert isinstance(objective, PPO | GRPO)  # noqa: S101 - made for these alone
        return objective

    def state_dict(self) -> dict[str, JSON]:
        """Return what lessons to come depend on."""
        return {"kl": self.kl.coefficient, "scores": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved `state_dict`."""
        self.kl.coefficient, self._seen = state["kl"], list(state["scores"])

    def rows(
        self, found: Sequence[Written], order: NDArray[np.int64], *, step_rows: int
    ) -> tuple[list[ReplyRow], dict[str, float]]:
        """Return a row for each reply, and what was measured on the way.

        Args:
            found: the replies, those of one prompt together; the same in every process.
            order: (replies,) int64: in which they will be taken first.
            step_rows: rows of an optimiser step over all processes.
        """
        rows = [reply_row(w.asked.input_ids, w.reply) for w in found]
        seen: list[Values] = [{} for _ in rows]
        measured: dict[str, float] = {}
        if self._asks_models(len(rows), step_rows):
            seen = self._seen_by_models(rows, order, step_rows)
            measured = _gap(found, seen)
        if isinstance(self.objective, PPO):
            own = self._of_values(self.objective, found, seen, measured)
        else:
            own = self._of_groups(self.objective, found)
        if REFERENCE in seen[0]:
            kl = [float((s[OLD] - s[REFERENCE]).sum()) for s in seen]
            measured["kl"] = sum(kl) / len(kl)
            measured["kl_coefficient"] = self.kl.coefficient
            self.kl.update(measured["kl"], len(kl))
        kept = [{**s, **o} for s, o in zip(seen, own, strict=True)]
        return [replace(r, values=v) for r, v in zip(rows, kept, strict=True)], measured

    def too_far(self, rows: Sequence[ReplyRow]) -> bool:
        """Return whether the policy has left the one that wrote `rows` by more than `kl_stop`."""
        limit = self.objective.kl_stop
        if limit is None:
            return False
        now = self._over(rows, lambda batch: {OLD: self._policy(batch)})
        log_ratio = np.concatenate(
            [n[OLD] - row.values[OLD] for n, row in zip(now, rows, strict=True)]
        )
        return float(approximate_kl(torch.from_numpy(log_ratio)).mean()) > limit

    def log_probs(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> list[Values]:
        """Return what the training forward says of each reply's tokens, under `OLD`."""
        rows = [reply_row(*pair) for pair in zip(prompts, replies, strict=True)]
        return self._over(rows, lambda batch: {OLD: self._policy(batch)})

    def kl_of(self, found: Sequence[Written]) -> list[float]:
        """Return log p - log p_ref of each reply, in nats."""
        rows = [reply_row(w.asked.input_ids, w.reply) for w in found]

        def both(batch: Batch) -> dict[str, Tensor]:
            policy = self._policy(batch)
            with self.assembled.tuned.disabled():
                return {OLD: policy, REFERENCE: self._policy(batch)}

        return [float((v[OLD] - v[REFERENCE]).sum()) for v in self._over(rows, both)]

    def _asks_models(self, replies: int, step_rows: int) -> bool:
        """Return whether learning needs more of the models than the training forward computes.

        Where all replies are one step that is taken once, the policy that learns is the one that
        wrote, and the ratio is 1 without knowing of what.
        """
        objective = self.objective
        once = objective.epochs == 1 and replies == step_rows
        return isinstance(objective, PPO) or objective.kl > 0 or not once

    def _policy(self, batch: Batch) -> Tensor:
        return policy_of(self.assembled.tuned.model, batch).log_probs

    def _seen_by_models(
        self, rows: Sequence[ReplyRow], order: NDArray[np.int64], step_rows: int
    ) -> list[Values]:
        """Return what policy, reference and value function say of the replies' tokens.

        Step by step and in the micro-batches of the first pass: the very numbers that training
        will compute, whatever the shape of a batch does to rounding.
        """
        seen: list[Values] = [{} for _ in rows]
        for start in range(0, len(order), step_rows):
            places = [int(place) for place in order[start : start + step_rows]]
            values = self._over([rows[place] for place in places], self._forward)
            for place, value in zip(places, values, strict=True):
                seen[place] = value
        return seen

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        objective, tuned = self.objective, self.assembled.tuned
        policy = policy_of(tuned.model, batch)
        found = {OLD: policy.log_probs}
        if isinstance(objective, PPO):
            found["old_values"] = objective.values(tuned.model, batch, policy.hidden)
        if objective.kl:
            with tuned.disabled():
                found[REFERENCE] = self._policy(batch)
        return found

    def _over(
        self, rows: Sequence[ReplyRow], forward: Callable[[Batch], dict[str, Tensor]]
    ) -> list[Values]:
        """Return what `forward` gives for each of `rows`, the rows of one step, in their order."""
        assembled, peers, dtype = self.assembled, self.peers, self.assembled.autocast_dtype
        mine, size = list(rows)[peers.rank :: peers.size], assembled.run.train.batch_size
        found: list[Values] = []
        with measuring(assembled.program):
            for start in range(0, len(mine), size):
                some: list[Any] = [replace(row, values={}) for row in mine[start : start + size]]
                batch = peers.to_device(assembled.collate(some))
                with torch.autocast(peers.device.type, dtype) if dtype else nullcontext():
                    values = forward(batch)
                sizes = [row.tokens for row in some]
                parts = {n: torch.split(v.float().cpu(), sizes) for n, v in values.items()}
                found += [{n: p[i].numpy() for n, p in parts.items()} for i in range(len(some))]
        return interleave(peers.gather(found))

    def _of_groups(self, objective: GRPO, found: Sequence[Written]) -> list[Values]:
        scores = torch.tensor([self._score(w) for w in found]).view(-1, objective.samples)
        advantages = objective.advantages(scores).flatten().tolist()
        return [
            {"advantages": np.full(len(w.reply), advantage, np.float32)}
            for w, advantage in zip(found, advantages, strict=True)
        ]

    def _of_values(
        self,
        objective: PPO,
        found: Sequence[Written],
        seen: Sequence[Values],
        measured: dict[str, float],
    ) -> list[Values]:
        scores = self._scaled(objective, [self._score(w) for w in found])
        lengths = [len(w.reply) for w in found]
        mask = _padded([np.ones(length, np.float32) for length in lengths]).bool()
        rewards = torch.zeros(mask.shape)
        if objective.kl and objective.kl_in == "reward":
            old, reference = (_padded([s[name] for s in seen]) for name in (OLD, REFERENCE))
            kl = kl_estimate(old, reference, kind=objective.kl_estimator)
            rewards -= self.kl.coefficient * kl
        rewards[torch.arange(len(found)), torch.tensor(lengths) - 1] += torch.tensor(scores)
        values = _padded([s["old_values"] for s in seen])
        learnt = generalised_advantages(
            rewards, values, mask, gamma=objective.gamma, lam=objective.lam
        )
        measured["value_explained"] = _explained(values[mask], learnt.returns[mask])
        advantages = whitened(learnt.advantages, mask) if objective.whiten else learnt.advantages
        return [
            {"advantages": a[:n].numpy().copy(), "returns": r[:n].numpy().copy()}
            for a, r, n in zip(advantages, learnt.returns, lengths, strict=True)
        ]

    def _score(self, reply: Written) -> float:
        return reply.score - (0.0 if reply.ended else self.objective.missing_end_penalty)

    def _scaled(self, objective: PPO, scores: list[float]) -> list[float]:
        """Return scores over their standard deviation and clipped, as far as is asked for."""
        values = np.array(scores)
        if objective.reward_scale == "running":
            self._take_note(values)
            count, _, squares = self._seen
            values = values / _scale(math.sqrt(squares / max(count - 1, 1)))
        elif objective.reward_scale == "batch":
            values = values / _scale(float(values.std()))
        if objective.reward_clip is not None:
            values = values.clip(-objective.reward_clip, objective.reward_clip)
        found: list[float] = values.tolist()
        return found

    def _take_note(self, scores: NDArray[np.float64]) -> None:
        """Take scores into the running mean and variance (Chan et al. 1979)."""
        count, mean, squares = self._seen
        total, distance = count + len(scores), float(scores.mean()) - mean
        squares += float(((scores - scores.mean()) ** 2).sum())
        squares += distance**2 * count * len(scores) / total
        self._seen = [total, mean + distance * len(scores) / total, squares]


def lessons_of(assembled: Assembled, peers: Peers) -> Lessons:
    """Return what makes rows of this run's replies."""
    objective = assembled.run.objective
    assert isinstance(objective, PPO | GRPO)  # noqa: S101 - made for these alone
    kl = AdaptiveKL(objective.kl)
    if isinstance(objective, PPO):
        kl = AdaptiveKL(objective.kl, objective.kl_target, objective.kl_horizon)
    return Lessons(assembled, peers, kl)


def _scale(spread: float) -> float:
    """Return what scores of this deviation are divided by: equal ones have no scale and stay."""
    return spread if spread > EPS else 1.0


def _padded(rows: Sequence[NDArray[np.float32]]) -> Tensor:
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)


def _gap(found: Sequence[Written], seen: Sequence[Values]) -> dict[str, float]:
    """Return the largest difference of log-probabilities between sampling and training."""
    both = zip(found, seen, strict=True)
    gaps = [np.abs(np.array(w.sampled_log_probs, np.float32) - s[OLD]).max() for w, s in both]
    return {"log_prob_gap": float(max(gaps))}


def _explained(values: Tensor, returns: Tensor) -> float:
    """Return the share of the returns' variance that the values explain; 0 for a constant one."""
    variance = float(returns.var(correction=0))
    return 1.0 - float((returns - values).var(correction=0)) / variance if variance else 0.0
