"""Reward models of earlier runs on the backbone of the policy that they judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from tunesmith.data.conversation import conversation
from tunesmith.data.render import Renderer
from tunesmith.errors import SpecError
from tunesmith.jobs.base import adapter_directory
from tunesmith.jobs.reward_runs import open_reward_run, turns_of
from tunesmith.jobs.run_directory import open_finished
from tunesmith.jobs.score import judged_row
from tunesmith.methods.roles import RewardScorer
from tunesmith.objectives.reward import Reward as RewardObjective
from tunesmith.rewards.contract import OpenRun, Reward, Scored

if TYPE_CHECKING:
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.rewards.run import RunReward

REWARD: Final = "reward"


def open_run_beside(assembled: Assembled) -> OpenRun:
    """Return what puts the reward model of a run beside the policy, and asks it for scores."""
    renderer = Renderer(assembled.tokenizer)

    def open_run(asked: RunReward) -> Reward:
        directory, run = open_finished(asked.path)
        if not isinstance(run.objective, RewardObjective):
            return open_reward_run(asked)  # a classifier, which has a backbone of its own
        if directory.model.exists():
            raise SpecError(
                f"{asked.path}: this reward run tuned whole weights, and a reward model on the "
                "policy's backbone is an adapter; train it with a method such as lora"
            )
        name = f"{REWARD}_{sum(n.startswith(REWARD) for n in assembled.tuned.adapters)}"
        scorer = RewardScorer(
            assembled.tuned, adapter_directory(asked.path), assembled.tokenizer, name=name
        )

        def scores(rows: Sequence[Scored]) -> list[float]:
            return scorer.score([_ids(row, run.data.max_length) for row in rows])

        return scores

    def _ids(row: Scored, max_length: int) -> list[int]:
        read = judged_row(renderer, conversation(turns_of(row)), max_length)
        ids: list[int] = read.input_ids.tolist()
        return ids

    return open_run
