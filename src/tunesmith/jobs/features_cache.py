"""Features of texts, computed once: the second time they are read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tunesmith.jobs.whole_file import whole_file
from tunesmith.models.zoo import cache_dir

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from tunesmith.data.classification import LabelledRow

logger = logging.getLogger(__name__)

_FORMAT: Final = "1"
"""Changes whenever the same texts and model would give other features."""


def features_path(rows: Sequence[LabelledRow], *, model: str, pooling: str, dtype: str) -> Path:
    """Return the file in which the features of `rows` belong.

    Its name is a hash of everything they depend on. Texts go into it as the tokens the model reads,
    which tokenizer and `data.max_length` have decided; labels do not, since features know none.

    Args:
        rows: tokenised texts.
        model: fingerprint of its files.
        pooling: what stands for a text.
        dtype: what the model computes in.
    """
    found = hashlib.sha256(f"{_FORMAT} {model} {pooling} {dtype}".encode())
    for row in rows:
        types = b"" if row.types is None else row.types.tobytes()
        found.update(f"{len(row.input_ids)} {len(types)} ".encode())
        found.update(row.input_ids.tobytes() + types)
    return cache_dir() / "features" / f"{found.hexdigest()}.safetensors"


def read_features(path: Path) -> NDArray[np.float32] | None:
    """Return (rows, width) float32 out of the cache, or None where they have to be computed."""
    if not path.exists():
        return None
    try:
        return load_file(path)["features"]
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("%s is damaged (%s); its features are computed again", path, error)
        return None


def write_features(path: Path, features: NDArray[np.float32]) -> None:
    """Put features (rows, width) float32 into the cache, whole or not at all.

    Raises:
        CheckpointError: they cannot be written.
    """
    with whole_file(path) as partial:
        save_file({"features": features}, partial)
