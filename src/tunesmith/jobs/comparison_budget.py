"""How many seeds and steps of every row fit into the time that a comparison may take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from tunesmith.errors import SpecError
from tunesmith.report.words import duration

LEAST_STEPS: Final = 10
"""Below which a run would say nothing."""


class Cost(NamedTuple):
    """What the runs of a row take, in seconds."""

    row: str
    overhead: float
    """Of a run besides its steps: loading, evaluating, saving."""
    step: float


class Trials(NamedTuple):
    """What is run of every row."""

    searching: int
    """Runs that try a learning rate."""
    searching_share: float
    """Of the steps, in each of those."""
    seeds: int
    """Whole runs."""

    def seconds(self, cost: Cost, steps: int) -> float:
        """Return what a row takes with `steps` in a whole run."""
        whole_runs = self.searching * self.searching_share + self.seeds
        return (self.searching + self.seeds) * cost.overhead + whole_runs * steps * cost.step

    def steps(self, cost: Cost, seconds: float) -> int:
        """Return how many steps a whole run may have for the row to end within `seconds`."""
        rest = seconds - self.seconds(cost, 0)
        return max(0, int(rest / (self.seconds(cost, 1) - self.seconds(cost, 0))))


class Plan(NamedTuple):
    """What fits."""

    seeds: int
    steps: list[int]
    """Of a whole run, a row."""


def planned(
    budget: float, costs: Sequence[Cost], trials: Trials, *, spent: float, rows: int, jobs: int
) -> Plan:
    """Return the steps each row may take in its equal share, with as many of the seeds as fit.

    Args:
        budget: of everything, in seconds.
        costs: of each row.
        trials: what is to run; only `seeds` may become fewer.
        spent: of the budget, on finding out the costs.
        rows: how many share the rest.
        jobs: runs at the same time.

    Raises:
        SpecError: fewer than `LEAST_STEPS` fit for some row even with one seed.
    """
    share = (budget - spent) * jobs / rows
    for seeds in range(trials.seeds, 0, -1):
        fewer = trials._replace(seeds=seeds)
        steps = [fewer.steps(cost, share) for cost in costs]
        if min(steps) >= LEAST_STEPS:
            return Plan(seeds, steps)
    cost = max(costs, key=lambda cost: fewer.seconds(cost, LEAST_STEPS))
    needed = spent + fewer.seconds(cost, LEAST_STEPS) * rows / jobs
    least = fewer.steps(cost, share)
    raise SpecError(
        f"budget: {duration(budget)} leaves {cost.row}, one of {rows} rows, {least} steps a run "
        f"even with one seed; {LEAST_STEPS} need about {duration(needed)} for all: give that much, "
        "compare fewer methods, or set learning_rates=1"
    )
