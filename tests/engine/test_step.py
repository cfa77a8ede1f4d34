"""One optimiser step: the right gradient, however it is cut, and what happens if it fails."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plain_task import (
    NextNumber,
    collate,
    events_of,
    gradients_seen,
    number_rows,
    plain_task,
    train,
    weighed_task,
    weights,
)
from tunesmith.engine.events import Event, MicroBatchHalved
from tunesmith.engine.listeners import JsonlWriter
from tunesmith.errors import TrainingError
from tunesmith.types import Batch, LossTerms


def plain_gradient(rows: list[list[int]]) -> dict[str, Tensor]:
    """The gradient of the mean loss over all rows at once, without the engine."""
    task = plain_task()
    terms = task.module(collate(rows))
    (terms.total / terms.count).backward()
    return {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_accumulation_does_not_change_the_gradient(accumulation: int, tmp_path: Path) -> None:
    task = plain_task()
    seen = gradients_seen(task)
    sizes = {"batch_size": 8 // accumulation, "accumulation_steps": accumulation}
    train(task, tmp_path, max_steps=1, max_grad_norm=None, **sizes)
    rows = plain_task().rows.take(8)
    torch.testing.assert_close(seen[0], plain_gradient(rows))


def test_a_micro_batch_that_does_not_divide_the_batch_changes_nothing(tmp_path: Path) -> None:
    task = plain_task(most=2)
    seen = gradients_seen(task)
    train(task, tmp_path, max_steps=1, max_grad_norm=None, batch_size=7)
    torch.testing.assert_close(seen[0], plain_gradient(plain_task().rows.take(7)))


def test_the_gradient_is_clipped_to_the_global_norm(tmp_path: Path) -> None:
    task = plain_task()
    seen = gradients_seen(task)
    listen = JsonlWriter(tmp_path / "metrics.jsonl")
    train(task, tmp_path, max_steps=1, max_grad_norm=0.5, batch_size=4, listen=listen)
    expected = plain_gradient(plain_task().rows.take(4))
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in expected.values()]
    for parameter, gradient in zip(parameters, expected.values(), strict=True):
        parameter.grad = gradient
    norm = nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.testing.assert_close(seen[0], expected)
    assert events_of(tmp_path, "step_done")[0]["grad_norm"] == pytest.approx(norm.item())


def test_the_penalty_is_added_once_whatever_the_accumulation(tmp_path: Path) -> None:
    task = plain_task()
    task.penalty = lambda: 0.5 * (task.model.get_parameter("norm.weight") ** 2).sum()
    seen = gradients_seen(task)
    train(task, tmp_path, max_steps=1, max_grad_norm=None, accumulation_steps=4)
    plain = plain_gradient(plain_task().rows.take(8))["norm.weight"]
    torch.testing.assert_close(seen[0]["norm.weight"], plain + torch.ones_like(plain))


def test_frozen_parameters_get_no_gradient_and_stay(tmp_path: Path) -> None:
    task = plain_task()
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    task.trainable = {"head.weight": task.trainable["head.weight"]}
    before = weights(task)
    seen = gradients_seen(task)
    train(task, tmp_path, max_steps=3)
    after = weights(task)
    assert seen[-1].keys() == {"head.weight"}
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"head.weight"}


def test_reported_loss_and_metrics_are_means_over_the_effective_batch(tmp_path: Path) -> None:
    listen = JsonlWriter(tmp_path / "metrics.jsonl")
    train(plain_task(), tmp_path, max_steps=1, accumulation_steps=4, listen=listen)
    task = plain_task()
    rows = task.rows.take(8)
    terms = task.module(collate(rows))
    event = events_of(tmp_path, "step_done")[0]
    assert event["loss"] == pytest.approx(terms.total.item() / terms.count)
    assert event["metrics"]["accuracy"] == pytest.approx(
        terms.metrics["accuracy"].item() / terms.count
    )
    assert event["supervised_tokens"] == sum(len(row) - 1 for row in rows)
    assert event["tokens"] == sum(map(len, rows))


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ({"batch_size": 8}, None),
        ({"batch_size": 2, "accumulation_steps": 4}, None),
        ({"batch_size": 4, "accumulation_steps": 2}, 2),
    ],
    ids=["one", "four", "halved"],
)
def test_micro_batches_are_told_of_the_whole_effective_batch(
    sizes: dict[str, int], most: int | None, tmp_path: Path
) -> None:
    task = weighed_task(most=most)
    seen = gradients_seen(task)
    train(task, tmp_path, max_steps=1, max_grad_norm=None, **sizes)
    plain = weighed_task()
    terms = plain.module(collate(plain.rows.take(8)))
    (terms.total / terms.count).backward()
    expected = {name: p.grad for name, p in plain.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(seen[0], expected)


class Spoiled(NextNumber):
    """Gives a loss of `value` in the calls that are named."""

    def __init__(self, model: nn.Module, calls: set[int], value: float) -> None:
        super().__init__(model)
        self.calls, self.value, self.called = calls, value, 0

    def forward(self, batch: Batch) -> LossTerms:
        terms = super().forward(batch)
        self.called += 1
        factor = self.value if self.called in self.calls else 1.0
        return LossTerms(terms.total * factor, terms.count, terms.metrics)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_weight(value: float, tmp_path: Path) -> None:
    task = plain_task()
    task.module = Spoiled(task.model, {1, 2}, value)
    before = weights(task)
    listen = JsonlWriter(tmp_path / "metrics.jsonl")
    outcome = train(task, tmp_path, max_steps=2, listen=listen)
    torch.testing.assert_close(weights(task), before, rtol=0, atol=0)
    assert outcome.skipped_steps == 2
    assert [event["skipped"] for event in events_of(tmp_path, "step_done")] == [True, True]


def test_training_goes_on_after_skipped_steps_that_are_not_three_in_a_row(tmp_path: Path) -> None:
    task = plain_task()
    task.module = Spoiled(task.model, {1, 2, 4, 5}, float("nan"))
    outcome = train(task, tmp_path, max_steps=7)
    assert (outcome.steps, outcome.skipped_steps) == (7, 4)


def test_three_steps_in_a_row_that_are_not_finite_stop_and_name_the_checkpoint(
    tmp_path: Path,
) -> None:
    task = plain_task()
    task.module = Spoiled(task.model, {5, 6, 7}, float("nan"))
    with pytest.raises(TrainingError, match=r"at step 7.*the last good checkpoint is .*step-0+4;"):
        train(task, tmp_path, max_steps=9, save_every=4)


def test_three_steps_that_are_not_finite_before_any_checkpoint_say_so(tmp_path: Path) -> None:
    task = plain_task()
    task.module = Spoiled(task.model, {1, 2, 3}, float("nan"))
    with pytest.raises(TrainingError, match=r"at step 3.*there is no checkpoint yet"):
        train(task, tmp_path)


def test_out_of_memory_halves_the_micro_batch_and_learns_the_same(tmp_path: Path) -> None:
    whole, cut = plain_task(), plain_task(most=3)
    events: list[Event] = []
    train(whole, tmp_path / "whole", batch_size=8, max_steps=5)
    train(cut, tmp_path / "cut", batch_size=8, max_steps=5, listen=events.append)
    # Sums over two rows instead of eight are rounded in another order; Adam carries that on.
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-4, atol=1e-6)
    halved = [event for event in events if isinstance(event, MicroBatchHalved)]
    sizes = [(event.step, event.micro_batch, event.accumulation_steps) for event in halved]
    assert sizes == [(1, 4, 2), (1, 2, 4)]


def test_a_micro_batch_is_halved_where_the_cpu_has_no_more(tmp_path: Path) -> None:
    """Its allocator has no error of its own: this one really asks for too much."""
    task = plain_task()
    events: list[Event] = []

    def ask(module: nn.Module, inputs: tuple[Tensor]) -> None:
        del module
        if len(inputs[0]) > 2:
            torch.empty(2**60, dtype=torch.uint8)

    task.model.register_forward_pre_hook(ask)
    outcome = train(task, tmp_path, batch_size=4, max_steps=2, listen=events.append)
    assert outcome.steps == 2
    assert [event.micro_batch for event in events if isinstance(event, MicroBatchHalved)] == [2]


def test_another_error_is_not_taken_for_memory(tmp_path: Path) -> None:
    task = plain_task()

    def fail(*_: object) -> None:
        raise RuntimeError("sizes differ")

    task.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="sizes differ"):
        train(task, tmp_path)


def test_out_of_memory_with_a_single_row_stops_with_advice(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"single row.*engine.checkpointing"):
        train(plain_task(most=0), tmp_path)


def test_the_smaller_micro_batch_is_kept_when_the_run_resumes(tmp_path: Path) -> None:
    outcome = train(plain_task(most=2), tmp_path, batch_size=8, max_steps=2)
    events: list[Event] = []
    train(
        plain_task(most=2),
        tmp_path,
        batch_size=8,
        max_steps=4,
        resume_from=outcome.checkpoint,
        listen=events.append,
    )
    assert not [event for event in events if isinstance(event, MicroBatchHalved)]


def test_the_forward_runs_in_the_autocast_dtype(tmp_path: Path) -> None:
    task = plain_task()
    dtypes: list[torch.dtype] = []
    task.model.get_submodule("head").register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    task.autocast_dtype = torch.bfloat16
    train(task, tmp_path, max_steps=1)
    assert dtypes == [torch.bfloat16]
    assert task.model.get_parameter("head.weight").dtype == torch.float32


def test_rows_are_taken_in_order_without_gaps(tmp_path: Path) -> None:
    task = plain_task()
    seen: list[list[int]] = []

    def collate_and_note(rows: list[list[int]]) -> Batch:
        seen.extend(rows)
        return collate(rows)

    task.collate = collate_and_note
    train(task, tmp_path, max_steps=3, accumulation_steps=2)
    assert seen == plain_task().rows.take(12)
    assert sorted(seen[:11]) == sorted(number_rows())


def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps run ahead of what is read of them here as on a GPU."""
    monkeypatch.setattr("tunesmith.engine.step.AHEAD", frozenset({"cpu"}))


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_steps_that_run_ahead_are_the_same_steps(
    max_grad_norm: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("waiting", "ahead"):
        task = plain_task()
        listen = JsonlWriter(tmp_path / f"{name}.jsonl")
        if name == "ahead":
            ahead(monkeypatch)
        settings: dict[str, Any] = {"max_grad_norm": max_grad_norm, "save_every": 3}
        train(task, tmp_path / name, max_steps=7, evaluate_every=2, listen=listen, **settings)
        kept = ("event", "step", "loss", "grad_norm", "tokens", "epoch", "learning_rate", "metrics")
        lines = [json.loads(line) for line in listen.path.read_text("utf-8").splitlines()]
        told = [{k: line.get(k) for k in kept} for line in lines]
        found.append((weights(task), [line | (line.pop("metrics") or {}) for line in told]))
    (waiting, said), (early, also) = found
    torch.testing.assert_close(early, waiting)
    for one, other in zip(said, also, strict=True):
        assert other == pytest.approx(one)


def test_a_step_that_is_not_finite_is_left_out_before_anyone_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead(monkeypatch)
    task = plain_task()
    task.module = Spoiled(task.model, {1, 2}, float("nan"))
    before = weights(task)
    outcome = train(task, tmp_path / "two", max_steps=2)
    torch.testing.assert_close(weights(task), before, rtol=0, atol=0)
    assert outcome.skipped_steps == 2
    task.module = Spoiled(task.model, set(range(1, 9)), float("inf"))
    with pytest.raises(TrainingError, match="at step 3, the 3rd step in a row"):
        train(task, tmp_path / "all", max_steps=8)
    torch.testing.assert_close(weights(task), before, rtol=0, atol=0)


def test_a_method_that_acts_after_a_step_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead(monkeypatch)
    task = plain_task()
    seen = gradients_seen(task)
    train(task, tmp_path, max_steps=2, max_grad_norm=None)
    torch.testing.assert_close(seen[0], plain_gradient(plain_task().rows.take(2)))
