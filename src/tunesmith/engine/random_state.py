"""Every random generator that training may draw from, as tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


def seed_all(seed: int, device: torch.device) -> None:
    """Seed Python, NumPy, and PyTorch on the CPU and on `device`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries still draw from the global generator
    torch.manual_seed(seed)
    if device.type == "mps":
        torch.mps.manual_seed(seed)


def capture(device: torch.device) -> dict[str, Tensor]:
    """Return the state of every generator: Python's, NumPy's, PyTorch's on the CPU and `device`."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - the global one
    mersenne = numpy_state["state"]
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor(
            [*mersenne["key"].tolist(), mersenne["pos"], numpy_state["has_gauss"]],
            dtype=torch.int64,
        ),
        "numpy_gauss": torch.tensor(numpy_state["gauss"], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Take over a captured state; a generator that it does not know keeps its own."""
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
    *key, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(  # noqa: NPY002 - the global one
        ("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, cached)
    )
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Put every generator back afterwards, so that what is drawn inside disturbs nothing."""
    state = capture(device)
    try:
        yield
    finally:
        restore(state, device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` on the CPU and on all GPUs, inside a `with` block, and put all back."""
    several = torch.cuda.device_count() > 1
    # Of several GPUs that are not named PyTorch warns, and tells to hide all but one.
    with torch.random.fork_rng(range(torch.cuda.device_count()) if several else None):
        torch.manual_seed(seed)
        yield
