"""Linear maps with 4- and 8-bit weights: the one place that knows the library that holds them."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError, SetupError
from tunesmith.models.sites import find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.settings import ModelSettings

OUTLIER: Final = 6.0
"""Inputs at least this large are multiplied unrounded (Dettmers et al. 2022, section 3.2)."""
_SAYS_NOTHING_OF_USE: Final = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
"""Loggers that warn of a missing inference kernel, and, in every product, of a cast."""


def require_quantiser(settings: ModelSettings, device: torch.device | str) -> None:
    """Check that this machine can do what `model.quantize` asks for; none asks for nothing.

    Raises:
        SetupError: bitsandbytes is missing or broken, or the device is none that it knows.
    """
    if settings.quantize == "none":
        return
    _bitsandbytes(settings.quantize)
    kind = torch.device(device).type
    if kind not in {"cpu", "cuda"}:
        raise SetupError(
            f"model.quantize: {settings.quantize} runs on cpu and cuda and not on '{kind}'; use "
            "engine.device: cpu, or model.quantize: none"
        )


def quantise(
    model: PreTrainedModel, settings: ModelSettings, *, device: torch.device | str
) -> None:
    """Give every linear map of the blocks a quantised weight, and bring `model` to `device`.

    nf4: blocks of 64 weights share a scale, and each weight is one of 16 quantiles of the normal
    distribution; double quantisation keeps the scales in 8 bits (Dettmers et al. 2023,
    arXiv:2305.14314, sections 3). int8: each row has a scale, and so has each token's input but for
    its outliers (Dettmers et al. 2022, arXiv:2208.07339). Head, embeddings, norms, biases and all
    that is not a site of a block stay as they are, and so does what the architecture wants in
    float32.

    Args:
        model: on the CPU, so that no more of it than one weight lies unquantised on `device`.
        settings: say which kind.
        device: cpu or cuda.

    Raises:
        SetupError: see `require_quantiser`.
        ModelError: the architecture is not in the table of sites.
    """
    require_quantiser(settings, device)
    for path in _quantisable(model):
        plain = model.get_submodule(path)
        model.set_submodule(path, _quantised(plain, settings, torch.device(device)))
    model.to(device)
    # On the CPU the others may still be windows on the file, which keep all of it in memory.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _quantisable(model: PreTrainedModel) -> list[str]:
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    paths = dict.fromkeys(site.module for block in find_sites(model).blocks for site in block.sites)
    return [
        path
        for path in paths
        if isinstance(model.get_submodule(path), nn.Linear | Conv1D)
        and kept.isdisjoint(path.split("."))
    ]


def _quantised(plain: Any, settings: ModelSettings, device: torch.device) -> nn.Module:
    """Return the quantised linear map on `device`; a Conv1D's weight is turned to (out, in)."""
    bnb = _bitsandbytes(settings.quantize)
    weight = plain.weight.detach()
    if isinstance(plain, Conv1D):
        weight = weight.t().contiguous()
    if settings.quantize == "nf4":
        new = _nf4(bnb.nn, weight, double=settings.double_quantize, device=device)
    else:
        new = _int8(bnb.nn, weight, device=device)
    if plain.bias is not None:
        new.bias = nn.Parameter(plain.bias.detach().to(device), requires_grad=False)
    # transformers keeps the class here as well, so `dequantise` understands its modules too.
    new.source_cls = type(plain)
    return new.train(plain.training)


def _nf4(library: Any, weight: Tensor, *, double: bool, device: torch.device) -> Any:
    out_features, in_features = weight.shape
    with torch.device("meta"):
        # A dtype of its own, or the first input would decide it, and the bias would follow.
        new = library.Linear4bit(in_features, out_features, False, compute_dtype=weight.dtype)
    new.weight = library.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=new
    ).to(device)
    keep_trainable(new)
    return new


def _int8(library: Any, weight: Tensor, *, device: torch.device) -> Any:
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

    On CPUs with AVX512-BF16 it does so in the first forward that wants no gradients, such as an
    evaluation, and for good: the scales are rounded to bfloat16, and products pass no gradient
    back, without a word.

    Raises:
        ModelError: it has done so.
    """
    for path, module in model.named_modules():
        if not _is_4bit(module):
            continue
        state: Any = module.weight.quant_state
        if state is not None and vars(state).get("packing_format_for_cpu", False):
            raise ModelError(
                f"{path} was run before anything was attached, and bitsandbytes repacked its "
                "weight for inference, with other scales and without gradients; load the model "
                "again, with tunesmith.load_model, or attach first"
            )
        module.support_avx512bf16_for_cpu = False


def is_quantised(module: nn.Module) -> bool:
    """Return whether `module` is a linear map with a quantised weight."""
    return _is_4bit(module) or _is_8bit(module)


@torch.no_grad()
def dequantised(module: nn.Module) -> Tensor:
    """Return the weight (out, in) of a quantised linear map, float32: what its codes stand for."""
    functional = sys.modules["bitsandbytes"].functional
    weight: Any = module.weight
    if _is_4bit(module):
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32  # not the dtype of before, which would round once more
        return functional.dequantize_4bit(weight.data, state)
    return functional.int8_vectorwise_dequant(weight.data, _row_scales(module))


def dequantise(model: PreTrainedModel) -> Callable[[], None]:
    """Make every quantised linear map of `model` the plain one it was, with the weight it has now.

    Modules stay the same objects with their hooks and children; only class and weight change. The
    codes are kept meanwhile, so this takes the memory of the plain weights besides.

    Returns:
        What puts the codes back, bit for bit.
    """
    before = [(m, type(m), m.weight) for m in model.modules() if is_quantised(m)]
    for module, _, _ in before:
        weight = dequantised(module).to(model.dtype)
        plain: type[nn.Module] = vars(module).get("source_cls", nn.Linear)
        if issubclass(plain, Conv1D):
            module.nf, module.nx = weight.shape
            weight = weight.t().contiguous()
        module.__class__ = plain
        module.weight = nn.Parameter(weight, requires_grad=False)
    # transformers writes these about a model that it quantised: the next to load it would again.
    said = [(vars(model), "hf_quantizer"), (vars(model.config), "quantization_config")]
    aside = [(owner, key, owner.pop(key)) for owner, key in said if key in owner]

    def undo() -> None:
        for owner, key, value in aside:
            owner[key] = value
        for module, kind, weight in before:
            module.__class__ = kind
            module.weight = weight

    return undo


def numel(parameter: Tensor) -> int:
    """Return how many weights `parameter` stands for; 4-bit codes are packed two in a byte."""
    bnb = sys.modules.get("bitsandbytes")
    packed = bnb is not None and isinstance(parameter, bnb.nn.Params4bit)
    state: Any = vars(parameter)["quant_state"] if packed else None
    return parameter.numel() if state is None else state.shape.numel()


def bytes_in_memory(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of the parameters that `modules` own, scales of codes included."""
    tensors: dict[int, Tensor] = {}
    for module in modules:
        own = [*module.parameters(recurse=False), *_scales(module)]
        tensors |= {id(tensor): tensor for tensor in own}
    return sum(tensor.nbytes for tensor in tensors.values())


def _scales(module: Any) -> list[Tensor]:
    if _is_8bit(module):
        return [_row_scales(module)]
    if not _is_4bit(module):
        return []
    state = module.weight.quant_state
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [state.absmax, *nested]


def _row_scales(module: Any) -> Tensor:
    """Return an 8-bit map's scales (out,), which its first product moves to the module."""
    scales: Tensor = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return scales


def _is_4bit(module: nn.Module) -> bool:
    # Where nobody has imported bitsandbytes, nothing is of its classes: it costs seconds.
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(module, bnb.nn.Linear4bit)


def _is_8bit(module: nn.Module) -> bool:
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(module, bnb.nn.Linear8bitLt)


def _bitsandbytes(wanted: str) -> Any:
    """Return the library.

    Raises:
        SetupError: it is missing or broken.
    """
    for name in _SAYS_NOTHING_OF_USE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise SetupError(
            f"model.quantize: {wanted} needs bitsandbytes, which cannot be imported ({error}); "
            "install it with: pip install 'tunesmith[quantize]'"
        ) from error
    return bitsandbytes
