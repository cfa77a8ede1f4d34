"""What fits into a comparison's time: worked out by hand."""

import pytest

from tunesmith.errors import SpecError
from tunesmith.jobs.comparison_budget import Cost, Trials, planned

TRIALS = Trials(searching=3, searching_share=1 / 3, seeds=3)
FAST, SLOW = Cost("bitfit", overhead=5, step=0.5), Cost("full", overhead=5, step=1)


def test_every_row_gets_the_steps_that_fill_its_equal_share() -> None:
    # (500 - 20) * 2 / 2 = 480 s a row; 6 runs cost 30 s besides their steps, and 3 runs of a third
    # of the steps and 3 whole ones are 4 whole ones: 450 / 4 = 112.5 s, of which steps take 1 or
    # half a second.
    plan = planned(500, [SLOW, FAST], TRIALS, spent=20, rows=2, jobs=2)
    assert plan.seeds == 3
    assert plan.steps == [112, 225]
    assert TRIALS.seconds(SLOW, 112) <= 480 < TRIALS.seconds(SLOW, 113)


def test_seeds_are_given_up_before_steps_become_too_few() -> None:
    # 3 seeds: (50 - 30) / 4 = 5 steps. 2: (50 - 25) / 3 = 8.3. 1: (50 - 20) / 2 = 15.
    assert planned(50, [SLOW], TRIALS, spent=0, rows=1, jobs=1) == (1, [15])


def test_too_little_names_the_row_and_what_all_would_need() -> None:
    # One seed of `full` with 10 steps: 4 * 5 + 2 * 10 = 40 s; 2 rows on one process, and 6 s spent.
    with pytest.raises(SpecError, match=r"30 s leaves full, one of 2 rows, 0 steps .* 1 min 26 s"):
        planned(30, [FAST, SLOW], TRIALS, spent=6, rows=2, jobs=1)
    assert planned(86.5, [FAST, SLOW], TRIALS, spent=6, rows=2, jobs=1).steps[1] == 10


def test_more_time_never_means_fewer_steps_of_as_many_seeds() -> None:
    plans = [
        planned(budget, [SLOW], TRIALS, spent=0, rows=1, jobs=1) for budget in range(40, 400, 7)
    ]
    seeds = [plan.seeds for plan in plans]
    assert seeds == sorted(seeds)
    steps = [plan.steps[0] for plan in plans if plan.seeds == 3]
    assert steps == sorted(steps)
