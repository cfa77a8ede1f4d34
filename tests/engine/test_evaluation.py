"""Measuring held-out rows, and what follows from it."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from plain_task import collate, number_rows, plain_task, train
from tunesmith.engine.distribution import Peers
from tunesmith.engine.evaluation import mean_loss, measuring
from tunesmith.engine.events import Evaluated, Event
from tunesmith.engine.progress import Best, Progress
from tunesmith.errors import DataError, SpecError
from tunesmith.types import IGNORE, Batch

ALONE = Peers(torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 3, 11, 64])
def test_the_loss_is_the_mean_over_all_supervised_tokens(batch_size: int) -> None:
    task, rows = plain_task(), number_rows()
    measured = mean_loss(task.module, rows, collate, batch_size=batch_size, peers=ALONE)
    losses = []
    for row in rows:
        logits = task.model(torch.tensor([row]))[0, :-1].double()
        losses += F.cross_entropy(logits, torch.tensor(row[1:]), reduction="none").tolist()
    assert measured["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)


def test_two_processes_share_the_rows_between_them() -> None:
    shares = [range(0, 11, 2)[rank::2] for rank in (0, 1)]
    assert sorted([*shares[0], *shares[1]]) == list(range(0, 11, 2))


def test_dropout_is_off_and_modes_come_back() -> None:
    task = plain_task(dropout=0.5)
    task.module.train()
    task.model.get_submodule("head").eval()
    first = mean_loss(task.module, number_rows(), collate, batch_size=4, peers=ALONE)
    again = mean_loss(task.module, number_rows(), collate, batch_size=4, peers=ALONE)
    assert first == again
    assert task.module.training
    assert not task.model.get_submodule("head").training


def test_no_gradient_is_kept() -> None:
    task = plain_task()
    with measuring(task.module):
        assert not task.module(collate(number_rows(2))).total.requires_grad


def test_the_forward_runs_in_the_autocast_dtype() -> None:
    task = plain_task()
    dtypes: list[torch.dtype] = []
    task.model.get_submodule("head").register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    mean_loss(
        task.module,
        number_rows(2),
        collate,
        batch_size=2,
        peers=ALONE,
        autocast_dtype=torch.bfloat16,
    )
    assert dtypes == [torch.bfloat16]


def test_rows_without_a_supervised_token_have_no_mean() -> None:
    def unsupervised(rows: list[list[int]]) -> Batch:
        batch = collate(rows)
        return batch | {"labels": torch.full_like(batch["labels"], IGNORE)}

    with pytest.raises(DataError, match="no supervised token"):
        mean_loss(plain_task().module, number_rows(), unsupervised, batch_size=4, peers=ALONE)


def test_no_rows_have_no_mean() -> None:
    with pytest.raises(DataError, match=r"data.evaluation"):
        mean_loss(plain_task().module, [], collate, batch_size=4, peers=ALONE)


def evaluations(tmp_path: Path, values: list[float], **settings: object) -> list[Evaluated]:
    """The evaluations of a run that measures `values`."""
    task = plain_task()
    served = iter(values)
    events: list[Event] = []
    task.evaluate = lambda: {"loss": 1.0, "accuracy": next(served)}
    train(task, tmp_path, listen=events.append, **settings)
    return [event for event in events if isinstance(event, Evaluated)]


def test_it_measures_before_in_between_and_after(tmp_path: Path) -> None:
    events = evaluations(tmp_path, [0.0] * 4, max_steps=5, evaluate_every=2)
    assert [event.step for event in events] == [0, 2, 4, 5]


def test_without_an_interval_it_measures_before_and_after(tmp_path: Path) -> None:
    assert [event.step for event in evaluations(tmp_path, [0.0] * 2)] == [0, 6]


def test_higher_is_better_for_what_is_no_loss(tmp_path: Path) -> None:
    events = evaluations(
        tmp_path, [0.9, 0.1, 0.3, 0.2, 0.3], max_steps=4, evaluate_every=1, best="accuracy"
    )
    assert [event.best for event in events] == [False, True, True, False, False]


@pytest.mark.parametrize("metric", ["loss", "mse", "divergence", "absolute_error"])
def test_lower_is_better_for_losses_divergences_and_errors(metric: str) -> None:
    progress = Progress(micro_batch=1)
    for step, value in enumerate((0.9, 0.5, 0.7, 0.3)):
        progress.step = step
        progress.record({metric: value}, metric)
    assert progress.best == Best(3, metric, 0.3)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_what_is_no_number_is_never_the_best(metric: str) -> None:
    progress = Progress(micro_batch=1)
    for step, value in enumerate((0.5, float("nan"), 0.5, float("nan"))):
        progress.step = step
        progress.record({metric: value}, metric)
    assert progress.best == Best(2, metric, 0.5)
    assert progress.stale_evaluations == 1


def test_early_stopping_ends_after_so_many_evaluations_without_improvement(tmp_path: Path) -> None:
    events = evaluations(
        tmp_path,
        [0.9, 0.1, 0.3, 0.2, float("nan"), 0.9],
        max_steps=9,
        evaluate_every=1,
        best="accuracy",
        early_stopping=2,
    )
    assert [event.step for event in events] == [0, 1, 2, 3, 4]


def test_a_metric_that_is_not_measured_cannot_decide(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"evaluation.best: 'bleu' is not measured; use one"):
        evaluations(tmp_path, [0.0], best="bleu")
