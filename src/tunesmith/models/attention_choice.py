"""Which kernel the segments of a batch take: measured once for a shape, and kept on disk."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import torch

from tunesmith.models.zoo import cache_dir
from tunesmith.ops.attention_choice import Backend, Shape, fastest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Asked = Literal["auto", "cudnn", "flash", "efficient", "varlen", "math"]
_SHORTEST: Final = 256
"""Tokens of a segment below which attention is too small a part to choose for."""
_LENGTHS: Final = 8
"""Batches of so many forms may take a dense kernel; each costs cuDNN a plan and a graph anew."""


class AttentionChoice:
    """Chooses for one model; see `backend`."""

    always: ClassVar[bool] = False
    """Whether it chooses outside of training too."""

    def __init__(self, model: PreTrainedModel, asked: Asked = "auto") -> None:
        self.asked: Asked = asked
        self._config = model.config.get_text_config()
        self._dtype: torch.dtype = model.dtype
        self._chosen: dict[tuple[int, int], Backend] = {}

    def backend(self, segments: int, longest: int, tokens: int, device: torch.device) -> Backend:
        """Return what a training batch should take; `varlen` is right for every batch.

        Args:
            segments: how many.
            longest: tokens of the longest.
            tokens: of all.
            device: where the batch is computed.
        """
        if device.type != "cuda" or segments * longest != tokens or longest < _SHORTEST:
            return "varlen"
        if self.asked != "auto":
            return self.asked
        form = (segments, longest)
        if form not in self._chosen:
            if len(self._chosen) >= _LENGTHS:
                return "varlen"
            self._chosen[form] = self._measured(*form, device)
        return self._chosen[form]

    def _measured(self, segments: int, length: int, device: torch.device) -> Backend:
        dtype = self._dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        heads: int = self._config.num_attention_heads
        # Not every architecture has these two, for which there is then one answer.
        kv_heads: int = getattr(self._config, "num_key_value_heads", None) or heads
        head_dim = getattr(self._config, "head_dim", None) or self._config.hidden_size // heads
        shape = Shape(segments, length, heads, kv_heads, head_dim, dtype)
        seconds = known(shape, device)
        if not seconds:
            with torch.autocast(device.type, enabled=False):
                seconds = remember(shape, device, fastest(shape, device))
        told = ", ".join(f"{name} {1e3 * taken:.2f} ms" for name, taken in seconds.items())
        logger.info("attention of %d x %d tokens: %s", segments, length, told or "no kernel")
        return next(iter(seconds), "varlen")


class SupposedChoice(AttentionChoice):
    """The choice for a model without weights: what kernels keep is alike, so none is measured.

    Segments one by one are not to be had: how long each is, only data would say.
    """

    always: ClassVar[bool] = True

    def backend(self, segments: int, longest: int, tokens: int, device: torch.device) -> Backend:
        """Return a dense kernel where the segments are of one length."""
        del device
        return "flash" if segments * longest == tokens else "varlen"


def known(shape: Shape, device: torch.device) -> dict[Backend, float]:
    """Return what was measured for `shape` on such a device before, fastest first, or nothing."""
    return _read().get(_key(shape, device), {})


def remember(
    shape: Shape, device: torch.device, seconds: dict[Backend, float]
) -> dict[Backend, float]:
    """Keep what was measured for later runs, and return it."""
    if seconds:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(_read() | {_key(shape, device): seconds}, indent=1), "utf-8")
        new.replace(path)
    return seconds


def _key(shape: Shape, device: torch.device) -> str:
    """Return what a measurement holds for: the device, the libraries and the shape."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else device.type
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    versions = f"torch {torch.__version__}, cudnn {cudnn}"
    return f"{name}; {versions}; " + " ".join(str(part) for part in shape)


def _path() -> Path:
    return cache_dir() / "attention.json"


def _read() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(_path().read_text("utf-8"))
    except (OSError, ValueError):  # none yet, or written by half: it is measured again
        return {}
    return found
