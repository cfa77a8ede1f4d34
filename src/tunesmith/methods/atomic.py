"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from tunesmith.errors import CheckpointError


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Give an empty directory that takes the place of `target` when the block ends well.

    Everything is on the disk before the names change; until then, and after any failure, what was
    at `target` is untouched.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission).
    """
    target = target.absolute()
    partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        _replace(partial, target)
    # safetensors reports a full disk in its own way.
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {target}: {error}; what was there is untouched, free space there or "
            "choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Force the files of `directory`, and their names, to the disk."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(partial: Path, target: Path) -> None:
    """Give `partial` the name `target`; what had it before is deleted last."""
    old = target.with_name(f".{target.name}.{uuid4().hex}.old")
    existed = target.exists()
    if existed:
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if existed:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
