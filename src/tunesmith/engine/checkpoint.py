"""Checkpoints on disk: whole or absent, safetensors and JSON only, checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tunesmith.engine.events import Listener, Warned
from tunesmith.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "checkpoints"
_PREFIX = "step-"
_UNFINISHED = ".unfinished-"
_TENSORS = ("trainable", "optimizer", "random")
_STATE = "state.json"
_FILES = (*(f"{name}.safetensors" for name in _TENSORS), _STATE)
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    """All that decides the future of a run."""

    trainable: dict[str, Tensor]
    """Whole tensors by parameter name."""
    optimizer: dict[str, Tensor]
    """Whole tensors as `<key>/<parameter name>`."""
    random: dict[str, Tensor]
    """Generator states as `<rank>/<generator>`."""
    state: dict[str, Any]
    """Everything else."""


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, whether they are sound or not."""
    found = (run_dir / FOLDER).glob(f"{_PREFIX}*")
    return sorted((path for path in found if path.name[len(_PREFIX) :].isdigit()), key=step_of)


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies, if there is one."""
    return run_dir / FOLDER / f"{_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the optimiser steps that were taken when `checkpoint` was saved."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def size_of(checkpoint: Path) -> int:
    """Return the bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def save_snapshot(run_dir: Path, step: int, snapshot: Snapshot) -> Path:
    """Write `snapshot` as the checkpoint of `step`, which appears whole or not at all.

    Raises:
        CheckpointError: the disk is full or cannot be written; what was there before is untouched.
    """
    folder = run_dir / FOLDER
    final = checkpoint_of(run_dir, step)
    unfinished = folder / f"{_UNFINISHED}{step:08d}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(unfinished, snapshot)
        _remove(final)
        os.replace(unfinished, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"could not save the checkpoint of step {step} to {final} ({error}); free space there "
            "and resume, earlier checkpoints are intact"
        ) from error
    return final


def _write(folder: Path, snapshot: Snapshot) -> None:
    tensors = (snapshot.trainable, snapshot.optimizer, snapshot.random)
    for name, content in zip(_TENSORS, tensors, strict=True):
        save_file(content, folder / f"{name}.safetensors")
    # Python's JSON: what resumes has to get NaN and infinities back.
    (folder / _STATE).write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        sync(path)


def sync(path: Path) -> None:
    """Have the system write `path` to the disk, so that a crash cannot undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None where every byte is as it was written."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        for name in _FILES:
            path, entry = checkpoint / name, manifest[name]
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if _digest(path) != entry["sha256"]:
                return f"{name} is not what was written (SHA-256 differs)"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, AttributeError, KeyError):
        return f"{_MANIFEST} is not a manifest"
    return None


def load_snapshot(checkpoint: Path) -> Snapshot:
    """Read a checkpoint back.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    if wrong := damage(checkpoint):
        raise CheckpointError(
            f"the checkpoint {checkpoint} is damaged: {wrong}; remove it and resume from an "
            "earlier one"
        )
    trainable, optimizer, random = (
        load_file(checkpoint / f"{name}.safetensors") for name in _TENSORS
    )
    return Snapshot(trainable, optimizer, random, load_state(checkpoint))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint that is whole holds beside tensors."""
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return state


def load_trainable(checkpoint: Path) -> dict[str, Tensor]:
    """Return the trained tensors of a checkpoint by parameter name, for whoever wants the best.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    return load_snapshot(checkpoint).trainable


def find_resumable(run_dir: Path, *, listeners: Sequence[Listener] = ()) -> Path | None:
    """Return the newest checkpoint that is whole, or None; each damaged one is warned about."""
    damaged: list[str] = []
    newest = None
    for checkpoint in reversed(checkpoints(run_dir)):
        wrong = damage(checkpoint)
        if wrong is None:
            newest = checkpoint
            break
        damaged.append(stepped_over(checkpoint, wrong))
    for message in damaged:
        for listener in listeners:
            listener(Warned(step=step_of(newest) if newest else 0, message=message))
    return newest


def stepped_over(checkpoint: Path, wrong: str) -> str:
    """Return the warning that a checkpoint is not taken for what is wrong with it."""
    return f"stepped over the damaged checkpoint {checkpoint}: {wrong}"


def prune(run_dir: Path, *, newest: int, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the `keep` newest up to step `newest`, and that of step `best`.

    Later ones are of a course that the run went back on, or damaged.
    """
    steps = [step_of(path) for path in checkpoints(run_dir)]
    kept = {best, *sorted(step for step in steps if step <= newest)[-keep:]}
    for path in checkpoints(run_dir):
        if step_of(path) not in kept:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that it is never seen in part."""
    if checkpoint.exists():
        leaving = checkpoint.with_name(f"{_UNFINISHED}{checkpoint.name}")
        os.replace(checkpoint, leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in (run_dir / FOLDER).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
