"""Finished runs as rewards: a reward model, or a classifier, each with a backbone of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tunesmith.data.conversation import conversation
from tunesmith.errors import SpecError
from tunesmith.jobs.predict import predictions
from tunesmith.jobs.result import load_run
from tunesmith.jobs.score import score
from tunesmith.objectives import Classification, Reward
from tunesmith.rewards.contract import Reward as Scorer
from tunesmith.rewards.contract import Scored

if TYPE_CHECKING:
    from tunesmith.jobs.result import LoadedRun
    from tunesmith.rewards.run import RunReward

_NOTHING_SAID: Final = 0.0


def open_reward_run(settings: RunReward) -> Scorer:
    """Return the reward that a finished run gives; it is loaded now, beside whatever is there.

    Raises:
        CheckpointError: there is no such run, or it did not finish.
        SpecError: the run learned no reward and no labels of texts, or not the label wanted.
    """
    loaded = load_run(settings.path)
    objective = loaded.run.objective
    if isinstance(objective, Classification):
        return _classifier(loaded, settings, objective)
    if not isinstance(objective, Reward):
        raise SpecError(
            f"{settings.path}: its objective is {objective.name}, which scores no reply; name a "
            "run with objective reward, or classification of texts"
        )
    if settings.wanted is not None:
        raise SpecError(f"{settings.path}: is a reward model, which has no label to be `wanted`")

    def scores(rows: Sequence[Scored]) -> list[float]:
        return score(loaded, [conversation(turns_of(row)) for row in rows])

    return scores


def _classifier(loaded: LoadedRun, settings: RunReward, objective: Classification) -> Scorer:
    """Return the probability of a label, or the number of a regression."""
    numbers = objective.kind == "regression"
    if numbers == (settings.wanted is not None) or (
        not numbers and settings.wanted not in (objective.labels or [])
    ):
        known = ", ".join(objective.labels or []) or "none (it gives a number)"
        raise SpecError(
            f"{settings.path}: `wanted` is {settings.wanted!r}, and its labels are: {known}"
        )

    def scores(rows: Sequence[Scored]) -> list[float]:
        whole = settings.reads == "prompt_and_reply"
        texts = [f"{row.prompt}{row.reply}" if whole else row.reply for row in rows]
        asked = [number for number, text in enumerate(texts) if text.strip()]
        # A classifier has nothing to say of an empty reply, which is worth nothing.
        found = [_NOTHING_SAID] * len(rows)
        said = predictions(loaded, [texts[number] for number in asked])
        for number, one in zip(asked, said, strict=True):
            wanted = settings.wanted
            found[number] = float(one.said) if wanted is None else one.probabilities[wanted]
        return found

    return scores


def turns_of(row: Scored) -> list[dict[str, Any]]:
    """Return what was asked and replied as turns."""
    asked = [dict(turn) for turn in row.messages] or [{"role": "user", "content": row.prompt}]
    return [*asked, {"role": "assistant", "content": row.reply}]
