"""A reward that a trained reward model gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tunesmith.errors import RewardError, SpecError
from tunesmith.rewards.contract import Attempt, OpenRun, RewardKind, Scored


class RunReward(RewardKind):
    """The score that a reward model gives the prompt and its reply."""

    kind: Literal["run"] = "run"
    """Asks a model that was trained with `objective.name: reward`, or a classifier of texts."""
    path: str
    """The directory of the run."""
    wanted: str | None = None
    """Of a classifier: the label whose probability is the score."""
    reads: Literal["reply", "prompt_and_reply"] = "reply"
    """Of a classifier: the text that it is given; prompt and reply simply follow each other."""

    def attempts(self, open_run: OpenRun | None) -> Attempt:
        """Return the reward model's scores.

        Raises:
            SpecError: nothing here can open a reward run.
        """
        if open_run is None:
            raise SpecError(
                f"rewards: the reward model {self.path!r} needs a base model beside it and cannot "
                "be used here; use it in a run, or score its rows with `tunesmith predict`"
            )
        score = open_run(self)

        def attempt(rows: Sequence[Scored]) -> list[float | RewardError]:
            return list(score(rows))

        return attempt
