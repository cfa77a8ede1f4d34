"""A run that was stopped, in whatever way, and resumed ends bit for bit like one that was not."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from plain_task import Rows, events_of, in_process, long_run, plain_task, train, weights
from tunesmith.engine.checkpoint import checkpoints, find_resumable, step_of
from tunesmith.engine.events import Event, RunStarted, Warned
from tunesmith.engine.listeners import JsonlWriter
from tunesmith.engine.random_state import seeded
from tunesmith.engine.task import Task
from tunesmith.errors import SpecError
from tunesmith.types import Batch, LossTerms


class Noisy(nn.Module):
    """Draws from every generator that there is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> LossTerms:
        terms: LossTerms = self.module(batch)
        noise = random.random() + np.random.rand() + random.gauss()  # noqa: NPY002
        return LossTerms(terms.total * (1 + noise), terms.count, terms.metrics)


def noisy_task(seed: int) -> Task[Any]:
    task = plain_task(dropout=0.4, seed=seed)
    task.module = Noisy(task.module)
    return task


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("step", [1, 4, 7, 8])
def test_resuming_ends_with_the_same_bits(step: int, tmp_path: Path) -> None:
    whole, resumed = noisy_task(1), noisy_task(2)
    settings = {"max_steps": 9, "save_every": 1, "keep": 99, "accumulation_steps": 2}
    train(whole, tmp_path / "whole", **settings)
    start = tmp_path / "whole" / "checkpoints" / f"step-{step:08d}"
    train(resumed, tmp_path / "resumed", resume_from=start, **settings)
    assert equal(weights(resumed), weights(whole))


def test_without_resuming_the_seed_decides(tmp_path: Path) -> None:
    first, second = noisy_task(1), noisy_task(1)
    train(first, tmp_path / "first")
    train(second, tmp_path / "second")
    assert equal(weights(first), weights(second))


def test_a_seed_is_drawn_from_for_a_while_without_a_word_about_many_gpus(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """PyTorch warns where it has to find several devices by itself, and tells to hide the rest."""
    states = {index: torch.zeros(16, dtype=torch.uint8) for index in range(4)}
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: states.pop(index))
    before = torch.get_rng_state()
    with seeded(3):
        drawn = torch.rand(2)
    assert not states
    assert not recwarn.list
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(3)))


def test_evaluation_disturbs_nothing(tmp_path: Path) -> None:
    with_it, without = noisy_task(1), noisy_task(1)

    def evaluate() -> dict[str, float]:
        torch.rand(3)
        random.random()
        return {"loss": float(np.random.rand())}  # noqa: NPY002

    with_it.evaluate = evaluate
    train(with_it, tmp_path / "with", evaluate_every=1)
    train(without, tmp_path / "without")
    assert equal(weights(with_it), weights(without))


def test_extra_state_goes_with_the_checkpoint(tmp_path: Path) -> None:
    task, again = plain_task(), plain_task()
    task.extra_state = lambda: {"temperature": 0.25}
    outcome = train(task, tmp_path)
    taken: list[Any] = []
    again.load_extra_state = taken.append
    train(again, tmp_path, resume_from=outcome.checkpoint)
    assert taken == [{"temperature": 0.25}]


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    task = plain_task()
    task.evaluate = lambda: {"loss": 2.0}
    first = train(task, tmp_path)
    again = plain_task()
    again.evaluate = lambda: pytest.fail("measured already")
    second = train(again, tmp_path, resume_from=first.checkpoint)
    assert equal(weights(again), weights(task))
    assert (second.steps, second.metrics, second.before) == (6, {"loss": 2.0}, {"loss": 2.0})


def test_early_stopping_counts_on_after_resuming(tmp_path: Path) -> None:
    losses = [5.0, 3.0, 2.0, 2.5, 2.5, 2.5, 2.5]
    settings = {"evaluate_every": 1, "early_stopping": 3, "max_steps": 9, "save_every": 1}
    task = plain_task()
    served = iter(losses)
    task.evaluate = lambda: {"loss": next(served)}
    whole = train(task, tmp_path / "whole", keep=9, **settings)
    again = plain_task()
    rest = iter(losses[5:])
    again.evaluate = lambda: {"loss": next(rest)}
    start = tmp_path / "whole" / "checkpoints" / "step-00000004"
    resumed = train(again, tmp_path / "resumed", resume_from=start, **settings)
    assert (whole.steps, whole.stopped_because) == (5, "early_stopping")
    assert (resumed.steps, resumed.stopped_because) == (5, "early_stopping")
    assert resumed.best == whole.best
    assert resumed.before == whole.before


def test_counters_go_on_after_resuming(tmp_path: Path) -> None:
    whole = train(plain_task(), tmp_path, save_every=2, keep=9)
    start = tmp_path / "checkpoints" / "step-00000002"
    resumed = train(plain_task(), tmp_path / "resumed", resume_from=start)
    assert (resumed.tokens, resumed.supervised_tokens) == (whole.tokens, whole.supervised_tokens)


def test_another_effective_batch_is_warned_of(tmp_path: Path) -> None:
    start = train(plain_task(), tmp_path, max_steps=2).checkpoint
    events: list[Event] = []
    train(plain_task(), tmp_path, resume_from=start, batch_size=3, listen=events.append)
    messages = [event.message for event in events if isinstance(event, Warned)]
    assert messages == [
        "rows an optimiser step takes: 2 when the checkpoint was saved, 3 now",
        "steps of the run: 2 when the checkpoint was saved, 6 now",
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert in_process(long_run, run_dir) == 0
    return run_dir


@pytest.mark.slow
def test_kill_9_at_five_random_steps_leaves_the_same_final_weights(
    uninterrupted: Path, tmp_path: Path
) -> None:
    steps = sorted(random.Random(time.time_ns()).sample(range(1, 40), k=5))
    for step in steps:
        assert in_process(long_run, tmp_path, killed_at=step) == -signal.SIGKILL, steps
    assert in_process(long_run, tmp_path) == 0
    final = load_file(tmp_path / "weights.safetensors")
    assert equal(final, load_file(uninterrupted / "weights.safetensors")), steps
    for kind, key in (("step_done", "loss"), ("evaluated", "metrics")):
        ours = [(event["step"], event[key]) for event in events_of(tmp_path, kind)]
        assert ours == [(event["step"], event[key]) for event in events_of(uninterrupted, kind)]


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_stops(uninterrupted: Path, tmp_path: Path) -> None:
    assert in_process(long_run, tmp_path, killed_at=17, signals=1) == 0
    found = find_resumable(tmp_path)
    assert found is not None
    assert step_of(found) == 17
    finished = events_of(tmp_path, "run_finished")
    assert [event["stopped_because"] for event in finished] == ["interrupted"]
    assert in_process(long_run, tmp_path) == 0
    final = load_file(tmp_path / "weights.safetensors")
    assert equal(final, load_file(uninterrupted / "weights.safetensors"))


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    assert in_process(long_run, tmp_path, killed_at=5, signals=2) == -signal.SIGTERM
    assert [step_of(path) for path in checkpoints(tmp_path)] == [3, 4]


def test_the_record_has_no_step_twice_after_resuming(tmp_path: Path) -> None:
    listen = JsonlWriter(tmp_path / "metrics.jsonl")
    train(plain_task(), tmp_path, save_every=2, keep=9, listen=listen)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step_done", "st')
    start = tmp_path / "checkpoints" / "step-00000002"
    again = JsonlWriter(tmp_path / "metrics.jsonl")
    train(plain_task(), tmp_path, save_every=2, keep=9, resume_from=start, listen=again)
    assert [event["step"] for event in events_of(tmp_path, "step_done")] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in events_of(tmp_path, "run_started")] == [0, 2]


def test_the_length_follows_from_epochs_rounded_up(tmp_path: Path) -> None:
    events: list[Event] = []
    train(plain_task(), tmp_path, max_steps=None, epochs=1.5, batch_size=4, listen=events.append)
    assert isinstance(events[0], RunStarted)
    assert events[0].total == 5  # 16.5 rows, 4 a step


def test_a_stream_of_unknown_length_needs_max_steps(tmp_path: Path) -> None:
    class Stream(Rows):
        rows_per_epoch = None

    task = plain_task()
    task.rows = Stream([[1, 2]])
    with pytest.raises(SpecError, match=r"train.max_steps: must be given where the data streams"):
        train(task, tmp_path, max_steps=None)
