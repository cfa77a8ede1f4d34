"""Rows whose replies the student writes itself, for a teacher to speak on (Agarwal et al. 2023).

Algorithm 1 of arXiv:2306.13649: with probability lambda, a step's replies y are sampled from the
student as it is then, y ~ p_S(. | x), and otherwise they are the given ones. What is learned at y
is the same in both cases, and no gradient goes through the sampling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.collate_replies import reply_row
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.batches import interleave
from tunesmith.jobs.experience_written import sampled
from tunesmith.rollout.draw import row_seeds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.data.rows import TokenRow
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.objectives import Distillation
    from tunesmith.types import JSON, RowStream


@dataclass
class OwnReplies:
    """A `RowStream` over the given rows; in some of the steps the student replies to their prompts.

    A step's replies are written when the step is taken, so they are always the student's own, and
    nothing but the number of steps has to be remembered.
    """

    assembled: Assembled
    objective: Distillation
    peers: Peers
    _steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check that the student can write.

        Raises:
            SpecError: it cannot, or what is asked of it is not known.
        """
        run = self.assembled.run
        if self.peers.size > 1 and run.engine.distribution == "fsdp":
            raise SpecError(
                "engine.distribution: fsdp: no process has all weights, and objective.on_policy "
                "lets each write replies of its own; use ddp"
            )
        if self.assembled.tuned.model.config.is_encoder_decoder:
            raise SpecError(
                "objective.on_policy: replies are sampled from a causal model, and this model "
                "reads and writes apart; use a causal model, or on_policy: 0"
            )
        if run.data.packing:
            raise SpecError(
                "data.packing: true fills rows with samples of known length, and the student's own "
                "replies have none before they are written; use packing: false, or on_policy: 0"
            )

    @property
    def given(self) -> RowStream[TokenRow]:
        """The rows as the data hold them."""
        return self.assembled.data.train

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows of an epoch, or None where nobody knows."""
        return self.given.rows_per_epoch

    @property
    def epoch(self) -> float:
        """Epochs taken so far."""
        return self.given.epoch

    def take(self, count: int) -> list[TokenRow]:
        """Return the rows of the next step; every process calls this alike.

        Raises:
            DataError: a row has no prompt to reply to.
        """
        rows, step = self.given.take(count), self._steps
        self._steps += 1
        # An order of its own, which does not depend on how many numbers the data's took.
        drawn = np.random.default_rng((self.assembled.run.seed, step)).random()
        if drawn >= self.objective.on_policy:
            return rows
        return self._written([prompt_of(row) for row in rows], first=step * count)

    def state_dict(self) -> dict[str, JSON]:
        """Return all that decides the rows to come, but the student."""
        return {"given": self.given.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place where `state` was taken."""
        self.given.load_state_dict(state["given"])
        self._steps = state["steps"]

    def _written(self, prompts: Sequence[list[int]], *, first: int) -> list[TokenRow]:
        """Return the student's replies with their prompts, each process having written its share.

        Args:
            prompts: the same in every process.
            first: number of the first reply in the run; the numbers decide the seeds.
        """
        peers, settings = self.peers, self.objective.sampling
        seeds = row_seeds(self.assembled.run.seed, range(first, first + len(prompts)))
        mine = slice(peers.rank, None, peers.size)
        found = sampled(self.assembled, peers, prompts[mine], seeds[mine], settings)
        replies = interleave(peers.gather([reply.tokens for reply in found]))
        longest = self.assembled.run.data.max_length
        return [
            reply_row(prompt, reply[: longest - len(prompt)]).row
            for prompt, reply in zip(prompts, replies, strict=True)
        ]


def prompt_of(row: TokenRow) -> list[int]:
    """Return the tokens before a row's last reply.

    Raises:
        DataError: there are none.
    """
    said = np.flatnonzero(row.supervised)
    start = int(said[np.flatnonzero(np.diff(said, prepend=-2) > 1)[-1]])
    if start == 0:
        raise DataError(
            "objective.on_policy: a row begins with its reply, so there is nothing that the "
            "student could reply to; use rows with prompts (and not data.supervise: all), or "
            "on_policy: 0"
        )
    prompt: list[int] = row.input_ids[:start].tolist()
    return prompt
