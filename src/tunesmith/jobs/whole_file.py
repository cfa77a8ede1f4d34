"""Files of the cache that appear whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from safetensors import SafetensorError

from tunesmith.engine.checkpoint import sync
from tunesmith.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

ANOTHER_CACHE: Final = "set TUNESMITH_CACHE to another folder"
_ABANDONED: Final = 3600.0
"""Seconds after which nobody writes any more to a file that is not whole."""


@contextmanager
def whole_file(path: Path, *, instead: str = ANOTHER_CACHE) -> Iterator[Path]:
    """Give the name of a file that takes the place of `path` when the block ends well.

    Args:
        path: its folder is made where it is missing.
        instead: what an error says can be done, beside freeing space.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission).
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with written(path, instead=instead):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            yield partial
            sync(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def written(path: Path, *, instead: str = ANOTHER_CACHE) -> Iterator[None]:
    """Name `path` in what goes wrong inside a `with` block that writes to it.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        yield
    # safetensors reports a full disk in its own way.
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; free space, or {instead}") from error


def _remove_abandoned(path: Path) -> None:
    """Delete what a process that was killed while writing `path` left behind."""
    for partial in path.parent.glob(f".{path.name}.*"):
        if time.time() - partial.stat().st_mtime > _ABANDONED:
            partial.unlink(missing_ok=True)
