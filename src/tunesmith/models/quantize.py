"""Linear maps with 4- and 8-bit weights in the place of a model's plain ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import SetupError
from tunesmith.models.quantize_library import (
    bitsandbytes,
    int8_linear,
    is_4bit,
    is_8bit,
    keep_trainable,
    library_scales,
    library_values,
)
from tunesmith.models.quantize_linear import Fp8Linear, Nf4Linear
from tunesmith.models.sites import find_sites
from tunesmith.ops.fp8_linear import CAPABILITY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.settings import ModelSettings

__all__ = [
    "bytes_in_memory",
    "dequantise",
    "dequantised",
    "is_quantised",
    "keep_trainable",
    "numel",
    "quantise",
    "require_quantiser",
]


def require_quantiser(settings: ModelSettings, device: torch.device | str) -> None:
    """Check that this machine can do what `model.quantize` asks for; none asks for nothing.

    Raises:
        SetupError: bitsandbytes is needed and missing or broken, the device is none that it
            knows, or a GPU multiplies no float8.
    """
    if settings.quantize == "none":
        return
    if settings.quantize != "fp8":
        bitsandbytes(settings.quantize)
    device = torch.device(device)
    if device.type not in {"cpu", "cuda"}:
        raise SetupError(
            f"model.quantize: {settings.quantize} runs on cpu and cuda and not on "
            f"'{device.type}'; use engine.device: cpu, or model.quantize: none"
        )
    if settings.multiplies_float8 and device.type == "cuda":
        _require_float8(torch.cuda.get_device_capability(device), settings)


def _require_float8(capability: tuple[int, int], settings: ModelSettings) -> None:
    """Raise SetupError where a GPU of this compute capability has no products in float8."""
    if capability >= CAPABILITY:
        return
    has, needs = (f"{major}.{minor}" for major, minor in (capability, CAPABILITY))
    what, instead = "quantize: fp8", "nf4"
    if settings.quantize == "nf4":
        what, instead = "products: float8", "nf4 with model.products: dtype"
    raise SetupError(
        f"model.{what} needs a GPU of compute capability {needs} or more (Ada, Hopper and later), "
        f"and this one has {has}; use model.quantize: {instead}"
    )


def quantise(
    model: PreTrainedModel, settings: ModelSettings, *, device: torch.device | str
) -> None:
    """Give every linear map of the blocks a quantised weight, and bring `model` to `device`.

    nf4: blocks of 64 weights share a scale, and each weight is one of 16 quantiles of the normal
    distribution; double quantisation keeps the scales in 8 bits (Dettmers et al. 2023,
    arXiv:2305.14314, section 3). fp8: each row of a weight has a scale, and so has each token's
    input and gradient; see `fp8_linear`. int8: each row has a scale, and so has each token's input
    but for its outliers (Dettmers et al. 2022, arXiv:2208.07339). Head, embeddings, norms, biases
    and all that is not a site of a block stay as they are, and so does what the architecture wants
    in float32.

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
    weight = plain.weight.detach()
    if isinstance(plain, Conv1D):
        weight = weight.t().contiguous()
    new: Any
    if settings.quantize == "fp8":
        new = Fp8Linear(weight.to(device))
    elif settings.quantize == "nf4":
        new = Nf4Linear(
            weight.to(device),
            bitsandbytes("nf4"),
            double=settings.double_quantize,
            float8=settings.multiplies_float8,
        )
    else:
        new = int8_linear(weight, device=device)
    if plain.bias is not None:
        new.bias = nn.Parameter(plain.bias.detach().to(device), requires_grad=False)
    # transformers keeps the class here as well, so `dequantise` understands its modules too.
    new.source_cls = type(plain)
    return new.train(plain.training)


def is_quantised(module: nn.Module) -> bool:
    """Return whether `module` is a linear map with a quantised weight."""
    return isinstance(module, Fp8Linear | Nf4Linear) or is_4bit(module) or is_8bit(module)


@torch.no_grad()
def dequantised(module: nn.Module) -> Tensor:
    """Return the weight (out, in) of a quantised linear map, float32: what its codes stand for."""
    if isinstance(module, Fp8Linear | Nf4Linear):
        return module.values()
    return library_values(module)


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
    """Return how many weights `parameter` stands for.

    Codes of 8 bits are int8 and those of 4 bits uint8, two in a byte, here and in bitsandbytes.
    """
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def bytes_in_memory(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of the parameters that `modules` own, scales of codes included."""
    tensors: dict[int, Tensor] = {}
    for module in modules:
        own = [*module.parameters(recurse=False), *_scales(module)]
        tensors |= {id(tensor): tensor for tensor in own}
    return sum(tensor.nbytes for tensor in tensors.values())


def _scales(module: nn.Module) -> list[Tensor]:
    if isinstance(module, Fp8Linear | Nf4Linear):
        return module.scale_tensors()
    return library_scales(module)
