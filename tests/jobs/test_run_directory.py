"""Run directories that a process was killed over, at the moments at which they change."""

import os
import shutil
from pathlib import Path

import pytest

from reply_runs import run_of
from tunesmith.errors import CheckpointError
from tunesmith.jobs.run_directory import RunDirectory, check_free, clear, write_text


def test_a_directory_whose_first_file_was_not_finished_is_free(
    tmp_path: Path, tiny_model: Path
) -> None:
    run = run_of(tmp_path, tiny_model)
    run.directory.mkdir(parents=True)
    (run.directory / ".run.yaml.x1y2").write_text("name: j")
    assert check_free(run, resume=True, overwrite=False).path == run.directory
    (run.directory / "notes.txt").write_text("not a run's")
    with pytest.raises(CheckpointError, match="no run directory"):
        check_free(run, resume=True, overwrite=False)


def test_a_directory_is_removed_whole_or_not_at_all(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, tiny_model)
    directory = RunDirectory(run.directory)
    directory.begin(run)
    (directory.path / "adapter").mkdir()
    remove = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "run.yaml").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            clear(directory)
    assert shutil.rmtree is remove
    assert check_free(run, resume=True, overwrite=False).path == directory.path
    clear(directory)
    directory.begin(run)
    assert os.listdir(tmp_path / "runs") == [run.name]


def test_a_file_is_the_old_one_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pairs.jsonl"
    write_text(path, "old")

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
