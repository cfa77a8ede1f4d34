"""The further roles that one model plays in a run: the value function beside the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tunesmith.engine.random_state import seeded
from tunesmith.errors import SpecError
from tunesmith.methods.roles import acting
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.methods.value_head import PATH, ValueChild, ValueHead
from tunesmith.objectives.ppo import PPO

if TYPE_CHECKING:
    from tunesmith.spec import Run

POLICY: Final = "default"
VALUE: Final = "value"


def with_roles(tuned: TunedModel, run: Run) -> TunedModel:
    """Return `tuned` with what the run's objective needs beside its own adapter.

    Raises:
        SpecError: a value function with an adapter of its own cannot go with checkpointing.
    """
    objective = run.objective
    if not isinstance(objective, PPO):
        return tuned
    if objective.value == "adapter":
        if run.engine.checkpointing != "none":
            raise SpecError(
                "objective.value: adapter: what the backward computes again would see the policy's "
                "adapter; use engine.checkpointing: none, or value: shared"
            )
        with seeded(run.seed + 1):
            attach(tuned, *run.methods, name=VALUE)
        tuned.enable(False, VALUE)
    attach(tuned, ValueHead(), name=VALUE if objective.value == "shared" else f"{VALUE}_head")
    if objective.value == "adapter":
        child = tuned.model.get_submodule(PATH)
        assert isinstance(child, ValueChild)  # noqa: S101 - attached just now
        child.role = lambda: acting(tuned, VALUE)
    return tuned


def without_roles(tuned: TunedModel) -> None:
    """Take off all but the run's own adapter, which is what is saved."""
    for name in tuned.adapters:
        if name != POLICY:
            tuned.remove(name)
