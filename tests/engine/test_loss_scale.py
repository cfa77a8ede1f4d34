"""Gradients through float16: those of float32, however small or large the loss is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plain_task import NextNumber, gradients_seen, plain_task, train, weights
from tunesmith.engine import loss_scale
from tunesmith.engine.events import Event, StepDone
from tunesmith.engine.loop import Outcome
from tunesmith.engine.task import Task
from tunesmith.types import Batch, LossTerms

TOO_SMALL, TOO_LARGE = 1e-7, 3e4
"""Factors of a loss with which its gradients leave float16 below, and times 65,536 above."""


class Times(nn.Module):
    """A task's model whose loss is so many times as large; not finite for some batches."""

    def __init__(self, module: nn.Module, factor: float, bad: int | None = None) -> None:
        super().__init__()
        self.module = module
        self.factor = factor
        self.bad = bad
        self.calls = 0

    def forward(self, batch: Batch) -> LossTerms:
        terms: LossTerms = self.module(batch)
        self.calls += 1
        factor = float("inf") if self.calls == self.bad else self.factor
        return LossTerms(terms.total * factor, terms.count, terms.metrics)


def task_in(dtype: torch.dtype | None, factor: float, bad: int | None = None) -> Task[Any]:
    task = plain_task()
    task.autocast_dtype = dtype
    assert isinstance(task.module, NextNumber)
    task.module = Times(task.module, factor, bad)
    return task


def scale_in(outcome: Outcome) -> float:
    """The scale that the last checkpoint remembers."""
    assert outcome.checkpoint is not None
    state = json.loads((outcome.checkpoint / "state.json").read_text(encoding="utf-8"))
    return float(state["progress"]["loss_scale"])


def gradients_of(task: Task[Any], path: Path, **settings: Any) -> list[dict[str, Tensor]]:
    """The gradients that methods see after each step."""
    seen = gradients_seen(task)
    train(task, path, max_grad_norm=None, **settings)
    return seen


@pytest.mark.parametrize("factor", [TOO_SMALL, 1.0, TOO_LARGE])
def test_gradients_are_those_of_float32(factor: float, tmp_path: Path) -> None:
    (expected,) = gradients_of(task_in(None, factor), tmp_path / "float32", max_steps=1)
    (found,) = gradients_of(task_in(torch.float16, factor), tmp_path / "float16", max_steps=1)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.01 * gradient.norm(), name


def test_without_a_scale_they_would_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factor above is small enough to tell."""
    monkeypatch.setattr("tunesmith.engine.step.loss_scale_of", lambda *_: None)
    (found,) = gradients_of(task_in(torch.float16, TOO_SMALL), tmp_path, max_steps=1)
    assert not found["blocks.0.0.weight"].any()


def test_a_step_whose_gradients_ran_over_is_computed_again(tmp_path: Path) -> None:
    task = task_in(torch.float16, TOO_LARGE)
    events: list[Event] = []
    before = weights(task)
    outcome = train(task, tmp_path, max_steps=3, listen=events.append)
    assert outcome.skipped_steps == 0
    assert 1 <= scale_in(outcome) < 2.0**16
    assert isinstance(task.module, Times)
    assert task.module.calls > 3
    assert [event.skipped for event in events if isinstance(event, StepDone)] == [False] * 3
    assert not torch.equal(weights(task)["head.weight"], before["head.weight"])


def test_a_loss_that_is_not_finite_is_no_reason_for_a_smaller_scale(tmp_path: Path) -> None:
    task = task_in(torch.float16, 1.0, bad=2)
    outcome = train(task, tmp_path, max_steps=3, batch_size=8)
    assert outcome.skipped_steps == 1
    assert scale_in(outcome) == 2.0**16


def test_the_scale_grows_again_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "STEADY", 3)
    whole, cut = task_in(torch.float16, 1e-3), task_in(torch.float16, 1e-3)
    outcome = train(whole, tmp_path / "whole", max_steps=8, save_every=4)
    assert scale_in(outcome) == 2.0**18
    middle = tmp_path / "whole" / "checkpoints" / "step-00000004"
    resumed = train(cut, tmp_path / "cut", max_steps=8, resume_from=middle)
    assert scale_in(resumed) == 2.0**18
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(cut).items())


def test_bfloat16_and_float32_are_not_scaled() -> None:
    for dtype in (None, torch.bfloat16):
        assert loss_scale.loss_scale_of(task_in(dtype, 1.0), None) is None  # type: ignore[arg-type]
