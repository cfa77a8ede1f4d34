"""What a run that learns from its own replies takes as rows: roll-outs, sampled as they are needed.

The loop asks for the rows of a step; where none are left, replies are sampled from the policy as it
is then, scored, and handed out `epochs` times, in another order each time.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.asked import AskedData
from tunesmith.data.collate_replies import ReplyRow
from tunesmith.data.rows import TokenRow
from tunesmith.engine.events import Gathered
from tunesmith.errors import SpecError
from tunesmith.jobs.experience_lessons import Lessons, lessons_of
from tunesmith.jobs.experience_written import Written, written
from tunesmith.objectives.grpo import GRPO
from tunesmith.objectives.ppo import PPO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tunesmith.engine.distribution import Peers
    from tunesmith.engine.events import Listener
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.rewards.build import WeightedSum
    from tunesmith.types import JSON

SAMPLES = 4
"""Replies that a `Gathered` event shows."""


@dataclass
class Experience:
    """A `RowStream` of replies: sampled, scored, and taken several times."""

    assembled: Assembled
    peers: Peers
    reward: WeightedSum
    listeners: Sequence[Listener] = ()
    _rows: list[ReplyRow] = field(default_factory=list, init=False)
    _order: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), init=False)
    _position: int = field(default=0, init=False)
    _pass: int = field(default=0, init=False)
    """Passes over the rows that are over."""
    _gathered: int = field(default=0, init=False)
    """Roll-outs so far."""
    _steps: int = field(default=0, init=False)
    lessons: Lessons = field(init=False)
    """Makes rows of what was written; remembers scales and coefficients."""

    def __post_init__(self) -> None:
        """Check that the run's settings go together.

        Raises:
            SpecError: the weights are sharded, so that no process can write by itself.
        """
        if self.peers.size > 1 and self.assembled.run.engine.distribution == "fsdp":
            raise SpecError(
                f"engine.distribution: fsdp: no process has all weights, and {self.objective.name} "
                "lets each write replies of its own; use ddp"
            )
        self.lessons = lessons_of(self.assembled, self.peers)

    @property
    def objective(self) -> PPO | GRPO:
        """The run's objective."""
        objective = self.assembled.run.objective
        assert isinstance(objective, PPO | GRPO)  # noqa: S101 - made for these alone
        return objective

    @property
    def prompts(self) -> AskedData:
        """The run's prompts."""
        data = self.assembled.data
        assert isinstance(data, AskedData)  # noqa: S101 - what `read_data` makes for these
        return data

    @property
    def samples(self) -> int:
        """Replies a prompt."""
        return self.objective.samples if isinstance(self.objective, GRPO) else 1

    @property
    def rows_per_epoch(self) -> int:
        """Rows that are taken while every prompt is answered once."""
        return self.prompts.train.rows_per_epoch * self.samples * self.objective.epochs

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far."""
        return self.prompts.train.epoch

    def take(self, count: int) -> list[ReplyRow]:
        """Return the rows of the next step; every process calls this alike.

        Raises:
            SpecError: the replies of a roll-out are no whole number of steps.
            RewardError: a reply cannot be scored, and its reward stops at that.
        """
        replies = self.objective.rollout.replies
        if replies % count:
            raise SpecError(
                f"objective.rollout.replies: {replies} replies are no whole number of steps of "
                f"{count} rows (train.batch_size x accumulation_steps x processes); use a multiple"
            )
        if self._position == len(self._order):
            self._next_pass(count)
        rows = self._coming(count)
        # A first look would find nothing: the policy is still the one that wrote.
        written_by_others = self._pass > 0 or self._position > 0
        if written_by_others and self.lessons.too_far(rows):
            self._gather(count)
            rows = self._coming(count)
        self._position += count
        self._steps += 1
        return self._with_texts(rows)

    def state_dict(self) -> dict[str, JSON]:
        """Return the replies at hand and all that decides those to come."""
        return {
            "prompts": self.prompts.train.state_dict(),
            "rows": [_packed(row) for row in self._rows],
            "order": self._order.tolist(),
            "position": self._position,
            "pass": self._pass,
            "gathered": self._gathered,
            "steps": self._steps,
            "lessons": self.lessons.state_dict(),
            "texts": None if self.prompts.texts is None else self.prompts.texts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place where `state` was taken, with the replies that were at hand.

        Raises:
            DataError: it was taken over other data.
        """
        self.prompts.train.load_state_dict(state["prompts"])
        self._rows = [_unpacked(row) for row in state["rows"]]
        self._order = np.array(state["order"], dtype=np.int64)
        self._position, self._pass = state["position"], state["pass"]
        self._gathered, self._steps = state["gathered"], state["steps"]
        self.lessons.load_state_dict(state["lessons"])
        # Checkpoints of before there were texts say nothing of them.
        if self.prompts.texts is not None and state.get("texts") is not None:
            self.prompts.texts.load_state_dict(state["texts"])

    def _with_texts(self, rows: list[ReplyRow]) -> list[ReplyRow]:
        """Return the rows of a step with the texts of that step, evenly spread over them.

        Processes take texts in turn, as they take rows, and each spreads its own over its rows.
        """
        if self.prompts.texts is None:
            return rows
        texts = self.prompts.texts.take(self.objective.pretraining_rows)
        spread: list[list[TokenRow]] = [[] for _ in rows]
        processes = self.peers.size
        most = math.ceil(len(texts) / processes)
        for number, text in enumerate(texts):
            turn, process = divmod(number, processes)
            row = turn * (len(rows) // processes) // most
            spread[row * processes + process].append(text)
        # The first token of a text is predicted by nothing.
        predicted = sum(int(text.supervised[1:].sum()) for text in texts)
        replies = {"replies": len(rows), "reply": range(sum(row.tokens for row in rows))}
        scale = self.objective.count(replies) / predicted
        return [
            replace(row, texts=tuple(own), text_scale=scale)
            for row, own in zip(rows, spread, strict=True)
        ]

    def _coming(self, count: int) -> list[ReplyRow]:
        places = self._order[self._position : self._position + count]
        return [self._rows[int(place)] for place in places]

    def _next_pass(self, count: int) -> None:
        self._pass += 1
        if not self._rows or self._pass >= self.objective.epochs:
            self._gather(count)
        else:
            self._shuffle(len(self._rows))

    def _shuffle(self, replies: int) -> None:
        seed = (self.assembled.run.seed, self._gathered, self._pass)
        self._order = np.random.default_rng(seed).permutation(replies)
        self._position = 0

    def _gather(self, count: int) -> None:
        """Sample and score new replies."""
        started = time.perf_counter()
        replies = self.objective.rollout.replies
        prompts = [
            prompt
            for prompt in self.prompts.train.take(replies // self.samples)
            for _ in range(self.samples)
        ]
        first = self._gathered * replies
        found = written(
            self.assembled,
            self.peers,
            self.reward,
            prompts,
            numbers=range(first, first + replies),
        )
        sampled = time.perf_counter()
        self._gathered, self._pass = self._gathered + 1, 0
        self._shuffle(replies)
        # In the order and the batches of the first step, whose ratios are then exactly 1.
        self._rows, measured = self.lessons.rows(found, self._order, step_rows=count)
        self._tell(found, measured, sampled - started, time.perf_counter() - started)

    def _tell(
        self,
        found: Sequence[Written],
        measured: dict[str, float],
        sampling_seconds: float,
        seconds: float,
    ) -> None:
        if not self.peers.is_main:
            return
        scores = np.array([w.score for w in found])
        tokens = sum(len(w.reply) for w in found)
        event = Gathered(
            step=self._steps + 1,
            replies=len(found),
            tokens=tokens,
            reward=float(scores.mean()),
            reward_std=float(scores.std()),
            rewards={
                name: float(np.mean([w.parts[name] for w in found])) for name in found[0].parts
            },
            length=tokens / len(found),
            ended=sum(w.ended for w in found) / len(found),
            measured=measured,
            tokens_per_second=tokens / max(sampling_seconds, 1e-9),
            seconds=seconds,
            samples=[
                {"prompt": w.asked.text, "reply": w.text, "reward": w.score}
                for w in found[:: self.samples][:SAMPLES]
            ],
        )
        for listener in self.listeners:
            listener(event)


def _packed(row: ReplyRow) -> dict[str, JSON]:
    arrays = {"input_ids": row.row.input_ids, **row.values}
    coded: dict[str, JSON] = {
        name: base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        for name, array in arrays.items()
    }
    return {**coded, "tokens": row.tokens}


def _unpacked(state: dict[str, Any]) -> ReplyRow:
    ids = np.frombuffer(base64.b64decode(state["input_ids"]), dtype=np.int32)
    supervised = np.arange(len(ids)) >= len(ids) - state["tokens"]
    values = {
        name: np.frombuffer(base64.b64decode(coded), dtype=np.float32).copy()
        for name, coded in state.items()
        if name not in {"input_ids", "tokens"}
    }
    return ReplyRow(TokenRow(ids.copy(), supervised, (len(ids),)), values)
