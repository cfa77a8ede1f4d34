"""How a run writes the replies that it learns from: how many at once, and how long they get."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tunesmith.errors import SpecError
from tunesmith.objectives import GRPO, Distillation
from tunesmith.objectives.sampling import FromReplies

if TYPE_CHECKING:
    from tunesmith.objectives import ObjectiveUnion
    from tunesmith.objectives.sampling import Sampling
    from tunesmith.spec import Run


class Writing(NamedTuple):
    """The longest replies to the longest prompts."""

    prompt: int
    """Tokens."""
    reply: int
    """Tokens."""
    replies: int
    """Of a roll-out, over all processes."""
    samples: int
    """Replies to each prompt."""
    at_once: int
    """The most that one process writes side by side."""

    def rows(self, processes: int = 1) -> int:
        """Return the most replies that each of so many processes writes at once."""
        return min(self.at_once, -(-self.replies // processes))


def sampling_of(objective: ObjectiveUnion) -> Sampling | None:
    """Return how replies are sampled, where they are."""
    if isinstance(objective, FromReplies):
        return objective.rollout
    writes = isinstance(objective, Distillation) and objective.on_policy > 0
    return objective.sampling if writes else None  # type: ignore[union-attr]  # it writes


def writing_of(run: Run, length: int, context: int) -> Writing | None:
    """Return how `run` writes; None where it learns from given replies alone.

    Args:
        run: any.
        length: tokens of the longest row.
        context: tokens that the model can attend over.

    Raises:
        SpecError: no prompt fits.
    """
    objective, settings = run.objective, sampling_of(run.objective)
    if settings is None:
        return None
    reply = settings.max_new_tokens
    if not isinstance(objective, FromReplies):
        # The student is asked what a row asks, which may be all of it but a token; what it writes
        # beyond the row's length is cut afterwards.
        prompt = length - 1
        rows = run.train.batch_size * run.train.accumulation_steps
        return Writing(prompt, min(reply, context - prompt), rows, 1, settings.batch_size)
    if reply >= length:
        raise SpecError(
            f"data.max_length: rows of {length} tokens leave no room for a prompt beside "
            f"objective.rollout.max_new_tokens: {reply}; raise the one or lower the other"
        )
    prompt = min(length - reply, objective.rollout.prompt_tokens or length)
    samples = objective.samples if isinstance(objective, GRPO) else 1
    return Writing(prompt, reply, objective.rollout.replies, samples, settings.batch_size)
