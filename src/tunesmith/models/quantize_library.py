"""What bitsandbytes is asked for: 4-bit codes, and linear maps in 8 bits, its own modules."""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any, Final

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError, SetupError

OUTLIER: Final = 6.0
"""Inputs at least this large are multiplied unrounded (Dettmers et al. 2022, section 3.2)."""
_SAYS_NOTHING_OF_USE: Final = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
"""Loggers that warn of a missing inference kernel, and, in every product, of a cast."""


def bitsandbytes(wanted: str) -> Any:
    """Return the library.

    Raises:
        SetupError: it is missing or broken.
    """
    for name in _SAYS_NOTHING_OF_USE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import bitsandbytes as library
    except (ImportError, OSError, RuntimeError) as error:
        raise SetupError(
            f"model.quantize: {wanted} needs bitsandbytes, which cannot be imported ({error}); "
            "install it with: pip install 'tunesmith[quantize]'"
        ) from error
    return library


def int8_linear(weight: Tensor, *, device: torch.device) -> Any:
    """Return bitsandbytes' 8-bit linear map of `weight` (out, in), without a bias, on `device`."""
    library = bitsandbytes("int8").nn
    out_features, in_features = weight.shape
    with torch.device("meta"):
        new = library.Linear8bitLt(
            in_features, out_features, False, has_fp16_weights=False, threshold=OUTLIER
        )
    new.weight = library.Int8Params(weight, requires_grad=False).to(device)
    new.register_forward_pre_hook(_in_dtype_of_bias)
    return new


def _in_dtype_of_bias(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Bring the input to the bias's dtype, or bitsandbytes brings the bias to the input's."""
    x, *others = args
    return args if module.bias is None else (x.to(module.bias.dtype), *others)


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights in `model` for inference.

    That is a model that transformers quantised: ours hold no modules of bitsandbytes in 4 bits. On
    CPUs with AVX512-BF16 it does so in the first forward that wants no gradients, such as an
    evaluation, and for good: the scales are rounded to bfloat16, and products pass no gradient
    back, without a word.

    Raises:
        ModelError: it has done so.
    """
    for path, module in model.named_modules():
        if not is_4bit(module):
            continue
        state: Any = module.weight.quant_state
        if state is not None and vars(state).get("packing_format_for_cpu", False):
            raise ModelError(
                f"{path} was run before anything was attached, and bitsandbytes repacked its "
                "weight for inference, with other scales and without gradients; load the model "
                "again, with tunesmith.load_model, or attach first"
            )
        module.support_avx512bf16_for_cpu = False


def library_values(module: Any) -> Tensor:
    """Return the weight (out, in) of one of bitsandbytes' linear maps, float32."""
    functional = sys.modules["bitsandbytes"].functional
    weight: Any = module.weight
    if is_4bit(module):
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32  # not the dtype of before, which would round once more
        return functional.dequantize_4bit(weight.data, state)
    return functional.int8_vectorwise_dequant(weight.data, _row_scales(module))


def library_scales(module: Any) -> list[Tensor]:
    """Return what one of bitsandbytes' linear maps keeps beside the codes; of others nothing."""
    if is_8bit(module):
        return [_row_scales(module)]
    if not is_4bit(module):
        return []
    state = module.weight.quant_state
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [state.absmax, *nested]


def _row_scales(module: Any) -> Tensor:
    """Return an 8-bit map's scales (out,), which its first product moves to the module."""
    scales: Tensor = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return scales


def is_4bit(module: nn.Module) -> bool:
    """Return whether `module` is bitsandbytes' own linear map in 4 bits."""
    # Where nobody has imported bitsandbytes, nothing is of its classes: it costs seconds.
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear4bit)


def is_8bit(module: nn.Module) -> bool:
    """Return whether `module` is bitsandbytes' own linear map in 8 bits."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear8bitLt)
