"""Which dtype the hardware computes well."""

from __future__ import annotations

from typing import Final

import torch

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What settings call a dtype, to the dtype."""


def best_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 where `device` multiplies it faster than float32, else float32.

    That is CUDA from compute capability 8.0 (Ampere) and CPUs with AVX512-BF16 or AMX. Elsewhere
    bfloat16 is emulated, and in float16 activations of some models are too large (T5, Gemma), so
    neither is chosen unasked.
    """
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32
