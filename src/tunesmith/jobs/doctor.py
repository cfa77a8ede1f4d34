"""Is everything here that a run needs, and does it work?"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.engine.distribution import connect
from tunesmith.engine.settings import EngineSettings
from tunesmith.errors import TunesmithError
from tunesmith.jobs.doctor_graphs import graph_checks
from tunesmith.jobs.environment import hardware, package_versions
from tunesmith.methods import LoRA
from tunesmith.methods.tuned import attach
from tunesmith.models.loading import load_model
from tunesmith.models.precision import best_dtype
from tunesmith.models.quantize import quantise
from tunesmith.models.settings import ModelSettings
from tunesmith.models.zoo import MODELS, cache_dir, is_cached
from tunesmith.objectives import SFT
from tunesmith.types import Proof

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZE = 1024
"""Side of the matrices that time a dtype."""


def diagnose(model: str | None = None, method: str = "lora") -> list[Proof]:
    """Return what was checked: versions, devices, dtypes, the cache, and one training step.

    Args:
        model: also take a training step on this model (path, zoo name or Hub id), and see whether
            its blocks compile.
        method: whose modules are in the blocks then.
    """
    device = connect(EngineSettings()).device
    checks = [
        Proof("versions", True, _listed(package_versions())),
        Proof("processor", True, _processor()),
        Proof("accelerators", True, ", ".join(_accelerators()) or "none: runs use the CPU"),
        *[_dtype_check(dtype, device) for dtype in _dtypes(device)],
        Proof("dtype auto", True, f"{_name(best_dtype(device))} on {device}"),
        _cache_check(),
        _attempt("one step on a tiny model", lambda: _step(_tiny_model(device))),
        _quantised_check("nf4", device),
        _quantised_check("int8", device),
    ]
    if model is not None:
        checks.append(_attempt(f"one step on {model}", lambda: _model_step(model, device)))
        checks += _graph_checks(model, method, device)
    return checks


def _graph_checks(model: str, method: str, device: torch.device) -> list[Proof]:
    try:
        return graph_checks(model, method, device)
    except (TunesmithError, OSError, RuntimeError) as error:
        return [Proof(f"one graph: {model} with {method}", False, str(error).splitlines()[0])]


def _listed(versions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {found or 'not installed'}" for name, found in versions.items())


def _processor() -> str:
    known = hardware()
    free = psutil.virtual_memory().available / 2**30
    total = psutil.virtual_memory().total / 2**30
    return f"{known['processor']}, {known['cores']} cores, {free:.1f} of {total:.1f} GiB free"


def _accelerators() -> list[str]:
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(f"{facts.name} ({facts.total_memory / 2**30:.0f} GiB)")
    if torch.backends.mps.is_available():
        found.append("Apple GPU (mps)")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(device: torch.device) -> list[torch.dtype]:
    """Return what `model.dtype` may well be: float16 is for GPUs, the older ones above all."""
    halves = [torch.bfloat16, torch.float16] if device.type == "cuda" else [torch.bfloat16]
    return [torch.float32, *halves]


def _dtype_check(dtype: torch.dtype, device: torch.device) -> Proof:
    """Multiply two matrices and say at what rate."""

    def product() -> str:
        one = torch.randn(SIZE, SIZE, device=device).to(dtype)
        torch.mm(one, one)
        started = time.perf_counter()
        for _ in range(4):
            result = torch.mm(one, one)
        finite = bool(result.isfinite().all())
        rate = 4 * 2 * SIZE**3 / (time.perf_counter() - started) / 1e9
        return f"{rate:,.0f} GFLOP/s{'' if finite else ', NOT FINITE'}"

    return _attempt(f"{_name(dtype)} products", product)


def _cache_check() -> Proof:
    folder = cache_dir()

    def write() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        free = shutil.disk_usage(folder).free / 2**30
        there = [name for name in MODELS if is_cached(name)]
        return f"{folder}, {free:.0f} GiB free, holds {', '.join(there) or 'no model yet'}"

    return _attempt("cache", write)


def _attempt(name: str, check: Callable[[], str]) -> Proof:
    try:
        return Proof(name, True, check())
    except (TunesmithError, OSError, RuntimeError) as error:
        return Proof(name, False, str(error).splitlines()[0])


def _quantised_check(kind: Literal["nf4", "int8"], device: torch.device) -> Proof:
    """Take a step on codes, if the library that holds them is there: it is an extra."""
    name = f"one step on a tiny model in {kind}"
    if not package_versions()["bitsandbytes"]:
        missing = "not tried without bitsandbytes: pip install 'tunesmith[quantize]'"
        return Proof(name, True, missing)

    def step() -> str:
        model = _tiny_model(torch.device("cpu"), best_dtype(device))
        quantise(model, ModelSettings(quantize=kind), device=device)
        return _step(model)

    return _attempt(name, step)


def _tiny_model(device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(device, dtype or best_dtype(device))


def _model_step(name: str, device: torch.device) -> str:
    return _step(load_model(name, device=device).model)


def _step(model: PreTrainedModel) -> str:
    """Take one LoRA step on 32 tokens and see the loss of these tokens fall."""
    tuned = attach(model, LoRA(rank=4))
    objective = SFT()
    ids = torch.arange(32, device=model.device)[None] % model.config.vocab_size
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    started = time.perf_counter()
    before = objective.loss(model, batch)
    torch.autograd.backward(before.total / before.count)
    optimizer.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        after = objective.loss(model, batch)
    first, then = float(before.total.detach()) / before.count, float(after.total) / after.count
    if not then < first:
        raise RuntimeError(f"the loss did not fall: {first:.4f}, then {then:.4f}")
    return f"loss {first:.4f}, then {then:.4f}, in {seconds:.2f} s on {model.device}"
