"""Two processes (torchrun, gloo) come to what one comes to, with DDP and with FSDP2."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plain_task import events_of, number_rows, plain_task, train, weighed_task, weights
from tunesmith.engine.checkpoint import load_snapshot
from tunesmith.engine.distribution import Peers
from tunesmith.engine.evaluation import mean_loss
from tunesmith.engine.listeners import JsonlWriter
from tunesmith.engine.task import Task

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PROGRAM = Path(__file__).with_name("two_processes.py")
TESTS = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize("distribution", ["ddp", "fsdp"])


NCCL = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    ],
)


@pytest.fixture(scope="module", params=["cpu", NCCL])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left; see two_processes.py."""
    root = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(PROGRAM), str(root), request.param]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def one_task() -> Task[Any]:
    """The task of two_processes.py, for one."""
    task = plain_task()
    rows = number_rows()[:5]
    task.penalty = lambda: 0.1 * (task.model.get_parameter("norm.weight") ** 2).sum()
    task.evaluate = lambda: mean_loss(
        task.module, rows, task.collate, batch_size=2, peers=Peers(torch.device("cpu"))
    )
    return task


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process comes to with the same effective batch."""
    root = tmp_path_factory.mktemp("one")
    task = one_task()
    listen = JsonlWriter(root / "metrics.jsonl")
    settings = {"accumulation_steps": 4, "evaluate_every": 2, "save_every": 3, "keep": 9}
    train(task, root, listen=listen, **settings)
    save_file(weights(task), root / "weights-0.safetensors")
    return root


def final(root: Path, rank: int = 0) -> dict[str, Tensor]:
    return load_file(root / f"weights-{rank}.safetensors")


@BOTH
@pytest.mark.parametrize(("kind", "key"), [("step_done", "loss"), ("step_done", "grad_norm")])
def test_two_processes_see_the_losses_of_one(
    distribution: str, kind: str, key: str, two: Path, one: Path
) -> None:
    ours = [event[key] for event in events_of(two / distribution, kind)]
    theirs = [event[key] for event in events_of(one, kind)]
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, abs=1e-5)


@BOTH
def test_two_processes_measure_what_one_measures(distribution: str, two: Path, one: Path) -> None:
    ours = [event["metrics"] for event in events_of(two / distribution, "evaluated")]
    theirs = [event["metrics"] for event in events_of(one, "evaluated")]
    assert [event["loss"] for event in ours] == pytest.approx(
        [event["loss"] for event in theirs], abs=1e-5
    )
    assert len(ours) == 4


@BOTH
def test_two_processes_train_the_weights_of_one(distribution: str, two: Path, one: Path) -> None:
    # Gradients are summed in another order, and Adam divides by their size.
    torch.testing.assert_close(final(two / distribution), final(one), rtol=1e-4, atol=1e-5)


@BOTH
def test_both_processes_end_with_the_same_weights(distribution: str, two: Path) -> None:
    torch.testing.assert_close(
        final(two / distribution, 0), final(two / distribution, 1), rtol=0, atol=0
    )


@BOTH
def test_two_processes_resume_bit_for_bit(distribution: str, two: Path) -> None:
    resumed = final(two / distribution / "resumed")
    torch.testing.assert_close(resumed, final(two / distribution), rtol=0, atol=0)


@BOTH
def test_a_checkpoint_of_two_processes_resumes_on_one(
    distribution: str, two: Path, one: Path, tmp_path: Path
) -> None:
    start = two / distribution / "checkpoints" / "step-00000003"
    task = one_task()
    train(task, tmp_path, resume_from=start, accumulation_steps=4, evaluate_every=2)
    torch.testing.assert_close(weights(task), final(one), rtol=1e-4, atol=1e-5)


@BOTH
def test_checkpoints_of_one_and_two_processes_hold_the_same(
    distribution: str, two: Path, one: Path
) -> None:
    place = Path("checkpoints", "step-00000003")
    ours, theirs = load_snapshot(two / distribution / place), load_snapshot(one / place)
    torch.testing.assert_close(ours.trainable, theirs.trainable, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.optimizer, theirs.optimizer, rtol=1e-4, atol=1e-5)
    assert {name.split("/")[0] for name in ours.random} == {"0", "1"}


def test_memory_that_one_process_lacks_makes_both_take_smaller_batches(
    two: Path, tmp_path: Path
) -> None:
    task = plain_task()
    train(task, tmp_path, batch_size=8)
    torch.testing.assert_close(final(two / "memory"), weights(task), rtol=1e-4, atol=1e-5)
    halved = events_of(two / "memory", "micro_batch_halved")
    assert [(event["micro_batch"], event["accumulation_steps"]) for event in halved] == [(2, 2)]


@BOTH
def test_two_processes_are_told_of_the_same_effective_batch(
    distribution: str, two: Path, tmp_path: Path
) -> None:
    task, told = weighed_task(), two / f"told-{distribution}"
    train(task, tmp_path, batch_size=8)
    torch.testing.assert_close(final(told), weights(task), rtol=1e-4, atol=1e-5)
    halved = events_of(told, "micro_batch_halved")
    assert len(halved) == (1 if distribution == "ddp" else 0)


@BOTH
def test_a_process_without_rows_to_measure_goes_on_with_the_others(
    distribution: str, two: Path, tmp_path: Path
) -> None:
    task, idle = plain_task(), two / f"idle-{distribution}"
    train(task, tmp_path, accumulation_steps=4)
    torch.testing.assert_close(final(idle), weights(task), rtol=1e-4, atol=1e-5)


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(two: Path) -> None:
    skipped = [event["skipped"] for event in events_of(two / "finite", "step_done")]
    assert skipped == [False, True, False, False, False, False]
    torch.testing.assert_close(final(two / "finite", 0), final(two / "finite", 1), rtol=0, atol=0)


def test_a_signal_to_one_process_stops_both_after_the_step(two: Path) -> None:
    outcomes = [(two / "signal" / f"outcome-{rank}").read_text() for rank in (0, 1)]
    assert outcomes == ["interrupted 2", "interrupted 2"]


def test_a_disk_that_fails_stops_both(two: Path) -> None:
    messages = [(two / "disk" / f"error-{rank}").read_text() for rank in (0, 1)]
    assert all("could not save the checkpoint of step 6" in message for message in messages)


def test_memory_that_a_shard_lacks_stops_with_advice(two: Path) -> None:
    message = (two / "shard" / "error-1").read_text()
    assert "out of memory in process 1 with 4 rows at once" in message


def test_8bit_state_cannot_be_sharded(two: Path) -> None:
    message = (two / "8bit" / "error-0").read_text()
    assert message.startswith("train.optimizer: 'adamw_8bit' cannot hold its state in shards")
