"""Measuring a run that learns from its own replies: what they are worth on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.data.asked import AskedData
from tunesmith.jobs.examine import Reply, judged_rows
from tunesmith.jobs.experience_lessons import lessons_of
from tunesmith.jobs.experience_written import written
from tunesmith.jobs.reward_roles import open_run_beside
from tunesmith.objectives.sampling import FromReplies
from tunesmith.rewards.build import WeightedSum, build_reward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.data.asked import Asked
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.types import JSON

KNOWN = ("completion", "answer", "reference", "label")
"""Columns that may hold the reply that a row knows."""


@dataclass
class ReplyExaminer:
    """Samples replies to the held-out prompts and scores them, with the same noise each time."""

    assembled: Assembled
    peers: Peers
    replies: list[Reply] = field(default_factory=list, init=False)
    """The replies of the last examination: the first `evaluation.samples` prompts."""
    outcomes: dict[str, JSON] = field(default_factory=dict, init=False)
    """Of the last examination, what each prompt scored."""
    reward: WeightedSum = field(init=False)
    """What replies are worth."""

    def __post_init__(self) -> None:
        """Get the rewards ready.

        Raises:
            SpecError: a reward cannot be used.
        """
        objective = self.assembled.run.objective
        assert isinstance(objective, FromReplies)  # noqa: S101 - made for these alone
        self.reward = build_reward(objective.rewards, open_run_beside(self.assembled))

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to measure on."""
        return len(self._prompts) > 0

    @property
    def _prompts(self) -> Sequence[Asked]:
        data = self.assembled.data
        assert isinstance(data, AskedData)  # noqa: S101 - what `read_data` makes for these
        return judged_rows(data.asked, self.assembled.run.evaluation)

    def examine(self, step: int | None = None) -> dict[str, float]:
        """Return the mean reward, its parts, length, and KL to the reference in nats a reply.

        The KL is the mean of log p - log p_ref over the sampled replies: exact in the mean where
        they are sampled at temperature 1 from all tokens.
        """
        del step  # replies are told by the one who asks
        prompts = self._prompts
        # Numbers before 0 belong to no roll-out of the run.
        found = written(
            self.assembled, self.peers, self.reward, prompts, numbers=range(-len(prompts), 0)
        )
        count = len(found)
        kl = lessons_of(self.assembled, self.peers).kl_of(found)
        scores = [w.score for w in found]
        self.replies = [
            Reply(w.asked.text, _known(w.asked), w.text)
            for w in found[: self.assembled.run.evaluation.samples]
        ]
        parts: dict[str, list[float]] = {
            f"reward_{name}": [w.parts[name] for w in found]
            for name in (self.reward.labels if len(self.reward.labels) > 1 else ())
        }
        self.outcomes = {"reward": list(scores), "kl": list(kl)}
        self.outcomes |= {name: list(values) for name, values in parts.items()}
        return {
            "reward": sum(scores) / count,
            **{name: sum(values) / count for name, values in parts.items()},
            "kl": sum(kl) / count,
            "length": sum(len(w.reply) for w in found) / count,
            "ended": sum(w.ended for w in found) / count,
        }


def _known(asked: Asked) -> str:
    found = (asked.columns[name] for name in KNOWN if name in asked.columns)
    return str(next(found, ""))
