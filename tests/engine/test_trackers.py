"""Trackers get the numbers of a run."""

from pathlib import Path

import pytest

from plain_task import plain_task, train
from tunesmith.engine.settings import TrackingSettings
from tunesmith.engine.trackers import Trackers
from tunesmith.errors import SetupError


def test_tensorboard_gets_every_step_and_evaluation_once_also_after_resuming(
    tmp_path: Path,
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = TrackingSettings(trackers=["tensorboard"], project="p")
    config = {"train": {"betas": [0.9, 0.99]}, "seed": 3}
    for resume in (None, "step-00000002"):
        task = plain_task()
        task.evaluate = lambda: {"loss": 2.5}
        start = tmp_path / "checkpoints" / resume if resume else None
        listen = Trackers(settings, tmp_path, config)
        train(task, tmp_path, save_every=2, keep=9, resume_from=start, listen=listen)
    events = reader.EventAccumulator(str(tmp_path / "p")).Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    evaluations = [(point.step, point.value) for point in events.Scalars("evaluation/loss")]
    assert evaluations == [(0, 2.5), (6, 2.5)]


def test_a_tracker_that_is_not_installed_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.meta_path", [])
    settings = TrackingSettings(trackers=["wandb"])
    with pytest.raises(SetupError, match=r"'wandb' is not installed.*tunesmith\[trackers\]"):
        Trackers(settings, tmp_path, {})
