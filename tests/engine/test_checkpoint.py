"""Checkpoints: whole or absent, checked, pruned, and never a pickle."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from plain_task import plain_task, train
from tunesmith.engine.checkpoint import (
    Snapshot,
    checkpoints,
    damage,
    find_resumable,
    load_snapshot,
    load_trainable,
    prune,
    save_snapshot,
    step_of,
)
from tunesmith.engine.events import Event, Warned
from tunesmith.engine.progress import Best
from tunesmith.engine.snapshot import find_best
from tunesmith.errors import CheckpointError


def snapshot(size: int = 3) -> Snapshot:
    return Snapshot(
        trainable={"a.weight": torch.randn(size)},
        optimizer={"exp_avg/a.weight": torch.randn(size)},
        random={"0/torch": torch.get_rng_state()},
        state={"step": 7, "text": "\u6a21\u578b"},
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = snapshot()
    path = save_snapshot(tmp_path, 7, saved)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    loaded = load_snapshot(path)
    assert loaded.state == saved.state
    for ours, theirs in (
        (loaded.trainable, saved.trainable),
        (loaded.optimizer, saved.optimizer),
        (loaded.random, saved.random),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(load_trainable(path), saved.trainable, rtol=0, atol=0)


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path: Path) -> None:
    outcome = train(plain_task(), tmp_path)
    assert {path.suffix for path in outcome.checkpoint.iterdir()} == {".safetensors", ".json"}


def test_a_sound_checkpoint_has_no_damage(tmp_path: Path) -> None:
    assert damage(save_snapshot(tmp_path, 1, snapshot())) is None


def test_a_file_that_was_cut_is_found_out(tmp_path: Path) -> None:
    path = save_snapshot(tmp_path, 1, snapshot())
    os.truncate(path / "optimizer.safetensors", 50)
    with pytest.raises(CheckpointError, match=r"damaged: optimizer.safetensors has 50 bytes"):
        load_snapshot(path)


def test_a_flipped_bit_is_found_out(tmp_path: Path) -> None:
    path = save_snapshot(tmp_path, 1, snapshot())
    content = bytearray((path / "trainable.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "trainable.safetensors").write_bytes(content)
    assert damage(path) == "trainable.safetensors is not what was written (SHA-256 differs)"


def test_a_missing_file_is_found_out(tmp_path: Path) -> None:
    path = save_snapshot(tmp_path, 1, snapshot())
    (path / "state.json").unlink()
    assert damage(path) == "state.json cannot be read (No such file or directory)"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state.json": 3}'])
def test_a_manifest_that_is_none_is_found_out(text: str, tmp_path: Path) -> None:
    path = save_snapshot(tmp_path, 1, snapshot())
    (path / "manifest.json").write_text(text)
    assert damage(path) == "manifest.json is not a manifest"


def test_the_newest_sound_checkpoint_is_found_and_damaged_ones_are_warned_of(
    tmp_path: Path,
) -> None:
    events: list[Event] = []
    for step in (3, 20, 100):
        save_snapshot(tmp_path, step, snapshot())
    (tmp_path / "checkpoints" / "step-00000100" / "state.json").write_text("{}")
    found = find_resumable(tmp_path, listeners=[events.append])
    assert found is not None
    assert step_of(found) == 20
    assert [type(event) for event in events] == [Warned]
    assert "step-00000100: state.json has 2 bytes" in events[0].message
    assert events[0].step == 20


def test_without_a_sound_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert find_resumable(tmp_path) is None
    (save_snapshot(tmp_path, 1, snapshot()) / "state.json").unlink()
    assert find_resumable(tmp_path) is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_snapshot(tmp_path, 1, snapshot(3))
    path = save_snapshot(tmp_path, 1, snapshot(5))
    assert load_trainable(path)["a.weight"].shape == (5,)
    assert [entry.name for entry in path.parent.iterdir()] == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(mount)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this system lets no one mount a tmpfs")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half_written(small_disk: Path) -> None:
    old = save_snapshot(small_disk, 1, snapshot())
    with pytest.raises(CheckpointError, match=r"could not save the checkpoint of step 2.*No space"):
        save_snapshot(small_disk, 2, snapshot(300_000))
    assert [path.name for path in old.parent.iterdir()] == ["step-00000001"]
    assert damage(old) is None


def test_a_full_disk_stops_training_with_its_checkpoints_intact(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(930_000))
    with pytest.raises(CheckpointError, match="No space"):
        train(plain_task(), small_disk, save_every=1, keep=99)
    found = checkpoints(small_disk)
    assert found
    assert [damage(path) for path in found] == [None] * len(found)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save_snapshot(tmp_path, step, snapshot())
    prune(tmp_path, newest=5, keep=2, best=1)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1, 4, 5]


def test_checkpoints_after_the_newest_go_since_the_run_went_back(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        save_snapshot(tmp_path, step, snapshot())
    prune(tmp_path, newest=2, keep=1, best=None)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2]


def test_training_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    task = plain_task()
    losses = iter([9.0, 3.0, 1.0, 5.0, 6.0, 7.0, 8.0])
    task.evaluate = lambda: {"loss": next(losses)}
    outcome = train(task, tmp_path, save_every=1, evaluate_every=1, keep=2)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 5, 6]
    assert outcome.best is not None
    assert (outcome.best.step, outcome.best.value) == (2, 1.0)


def measured_run(run_dir: Path, metric: str, values: list[float], *, every: int = 1) -> Best:
    """Train with a checkpoint a step and these evaluations, the first before training."""
    task, served = plain_task(), iter(values)
    task.evaluate = lambda: {metric: next(served)}
    outcome = train(task, run_dir, save_every=1, evaluate_every=every, keep=9, best=metric)
    assert outcome.best is not None
    return outcome.best


def harm(run_dir: Path, step: int) -> None:
    os.truncate(run_dir / "checkpoints" / f"step-{step:08d}" / "trainable.safetensors", 9)


def test_the_best_checkpoint_is_found_without_a_word(tmp_path: Path) -> None:
    best = measured_run(tmp_path, "loss", [9.0, 3.0, 1.0, 2.0, 6.0, 7.0, 8.0])
    harm(tmp_path, 5)
    found = find_best(tmp_path, best, listeners=[pytest.fail])
    assert found == tmp_path / "checkpoints" / "step-00000002"


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("loss", [0.5, 3.0, 1.0, float("nan"), 2.0, 7.0, 8.0]),
        ("accuracy", [9.0, 3.0, 8.0, float("nan"), 7.0, 2.0, 1.0]),
    ],
)
def test_the_next_best_checkpoint_takes_the_place_of_a_damaged_one_with_a_warning(
    tmp_path: Path, metric: str, values: list[float]
) -> None:
    best = measured_run(tmp_path, metric, values)
    assert best.step == 2
    harm(tmp_path, 2)
    events: list[Event] = []
    found = find_best(tmp_path, best, listeners=[events.append])
    assert found == tmp_path / "checkpoints" / "step-00000004"
    (warned,) = events
    assert isinstance(warned, Warned)
    assert "step-00000002: trainable.safetensors has 9 bytes" in warned.message
    assert f"the result is {found}, whose {metric} is {values[4]:.4g}" in warned.message


def test_every_damaged_checkpoint_that_could_have_been_the_best_is_named(tmp_path: Path) -> None:
    best = measured_run(tmp_path, "loss", [9.0, 3.0, 1.0, 2.0, 6.0, 7.0, 8.0])
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    harm(tmp_path, 3)
    events: list[Event] = []
    found = find_best(tmp_path, best, listeners=[events.append])
    assert found == tmp_path / "checkpoints" / "step-00000001"
    gone, cut = (event.message for event in events if isinstance(event, Warned))
    assert "step-00000002: manifest.json cannot be read (No such file" in gone
    assert "step-00000003: trainable.safetensors has 9 bytes" in cut


def test_a_checkpoint_that_was_not_evaluated_is_never_the_best(tmp_path: Path) -> None:
    best = measured_run(tmp_path, "loss", [9.0, 1.0, 5.0, 4.0], every=2)
    assert best.step == 2
    for step in (2, 4, 6):
        harm(tmp_path, step)
    events: list[Event] = []
    assert find_best(tmp_path, best, listeners=[events.append]) is None
    first = events[0]
    assert isinstance(first, Warned)
    assert first.message.endswith("was the best, the result is the model after the last step")


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path: Path) -> None:
    save_snapshot(tmp_path, 1, snapshot())
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1]


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".unfinished-00000004"
    left.mkdir(parents=True)
    (left / "trainable.safetensors").write_bytes(b"half")
    train(plain_task(), tmp_path)
    assert not left.exists()


def test_a_new_run_does_not_write_among_old_checkpoints(tmp_path: Path) -> None:
    train(plain_task(), tmp_path)
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        train(plain_task(), tmp_path)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    outcome = train(plain_task(), tmp_path)
    task = plain_task()
    task.trainable = {"head.weight": task.trainable["head.weight"]}
    with pytest.raises(CheckpointError, match=r"holds 'blocks.0.0.bias' with shape"):
        train(task, tmp_path, resume_from=outcome.checkpoint)


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path: Path) -> None:
    outcome = train(plain_task(), tmp_path)
    whole = load_snapshot(outcome.checkpoint)
    later = Snapshot(whole.trainable, whole.optimizer, whole.random, whole.state | {"version": 99})
    path = save_snapshot(tmp_path, 6, later)
    with pytest.raises(CheckpointError, match="has version 99"):
        train(plain_task(), tmp_path, resume_from=path)


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    outcome = train(plain_task(), tmp_path)
    state = json.loads((outcome.checkpoint / "state.json").read_text())
    assert state["rows"] == {"taken": 12}
    assert state["progress"]["step"] == 6
