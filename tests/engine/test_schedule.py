"""The learning rate's course, against transformers' own."""

from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from tunesmith.engine.schedule import factor, warmup_steps
from tunesmith.engine.settings import TrainSettings

TOTAL = 40


def course(**settings: Any) -> list[float]:
    chosen = TrainSettings(**settings)
    return [factor(chosen, step, TOTAL) for step in range(TOTAL + 1)]


def reference(make: Any, **settings: Any) -> list[float]:
    """The factors that a schedule of transformers gives to an optimiser with learning rate 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer, **settings)
    return [schedule.lr_lambdas[0](step) for step in range(TOTAL + 1)]


def test_linear_is_that_of_transformers() -> None:
    expected = reference(
        get_linear_schedule_with_warmup, num_warmup_steps=5, num_training_steps=TOTAL
    )
    assert course(schedule="linear", warmup=5) == pytest.approx(expected)


def test_cosine_is_that_of_transformers() -> None:
    expected = reference(
        get_cosine_schedule_with_warmup, num_warmup_steps=5, num_training_steps=TOTAL
    )
    assert course(schedule="cosine", warmup=5) == pytest.approx(expected)


def test_cosine_with_a_lowest_rate_is_that_of_transformers() -> None:
    expected = reference(
        get_cosine_with_min_lr_schedule_with_warmup,
        num_warmup_steps=5,
        num_training_steps=TOTAL,
        min_lr_rate=0.1,
    )
    ours = course(schedule="cosine", warmup=5, min_learning_rate_ratio=0.1)
    assert ours == pytest.approx(expected)


def test_constant_is_that_of_transformers() -> None:
    expected = reference(get_constant_schedule_with_warmup, num_warmup_steps=5)
    assert course(schedule="constant", warmup=5) == pytest.approx(expected)


def test_wsd_is_that_of_transformers() -> None:
    expected = reference(
        get_wsd_schedule,
        num_warmup_steps=5,
        num_decay_steps=10,
        num_training_steps=TOTAL,
        decay_type="1-sqrt",
        min_lr_ratio=0.1,
    )
    ours = course(schedule="wsd", warmup=5, decay=0.25, min_learning_rate_ratio=0.1)
    # In the warm-up theirs rises from the lowest rate, ours from 0 like all other schedules.
    assert ours[5:] == pytest.approx(expected[5:])


def test_linear_with_a_lowest_rate_ends_there() -> None:
    ours = course(schedule="linear", warmup=0, min_learning_rate_ratio=0.2)
    assert (ours[0], ours[TOTAL // 2], ours[TOTAL]) == pytest.approx((1.0, 0.6, 0.2))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (7, 7), (0.03, 2), (0.5, 20), (1, 1)])
def test_warmup_is_given_in_steps_or_as_a_fraction(warmup: float, steps: int) -> None:
    assert warmup_steps(TrainSettings(warmup=warmup), TOTAL) == steps


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_a_single_step_has_a_rate(schedule: Any) -> None:
    assert factor(TrainSettings(schedule=schedule, warmup=0), 0, 1) == 1.0
    assert factor(TrainSettings(schedule=schedule, warmup=0.03), 0, 1) == 1.0
