"""How long one frozen linear map of an 8B model takes forward and backward, by kind of base.

    python bench/quantize_products.py [--rows 8192]

On a GPU: the maps of a Llama of 8B parameters, bfloat16 inputs, only the input wants a gradient.
`nf4 library` is bitsandbytes' own module; the others are compiled. Medians of 20 after 5, in
milliseconds; `gain` of a kind is bfloat16's time over its own. Writes
bench/results/quantize_products.json.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = {
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "gate, up": (14336, 4096),
    "down": (4096, 14336),
}
WARMUP, TIMES = 5, 20
OUT = Path(__file__).resolve().parent / "results" / "quantize_products.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    rows = parser.parse_args().rows
    from tunesmith.jobs.environment import hardware, package_versions

    results = {name: measured(*shape, rows=rows) for name, shape in SHAPES.items()}
    for name, times in results.items():
        print(name, json.dumps(times), flush=True)
    record = {"rows": rows, "milliseconds": results}
    record |= {"hardware": hardware(), "versions": package_versions()}
    OUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measured(out: int, width: int, *, rows: int) -> dict[str, float]:
    import bitsandbytes

    from tunesmith.models.quantize_linear import Fp8Linear, Nf4Linear

    torch.manual_seed(0)
    weight = torch.randn(out, width, device="cuda", dtype=torch.bfloat16) * 0.02
    plain = nn.Linear(width, out, bias=False, device="cuda", dtype=torch.bfloat16)
    plain.requires_grad_(False)

    def nf4(*, float8: bool) -> nn.Module:
        return Nf4Linear(weight, bitsandbytes, double=True, float8=float8)

    maps: dict[str, nn.Module] = {
        "bfloat16": plain,
        "fp8": Fp8Linear(weight),
        "nf4": nf4(float8=False),
        "nf4-float8": nf4(float8=True),
    }
    for module in maps.values():
        module.compile(fullgraph=True)
    maps["nf4 library"] = library(weight, bitsandbytes.nn)
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(rows, out, device="cuda", dtype=torch.bfloat16)
    found = {name: milliseconds(step(module, x, grad)) for name, module in maps.items()}
    return found | {f"gain {name}": found["bfloat16"] / found[name] for name in maps}


def library(weight: Tensor, modules: Any) -> nn.Module:
    """Return bitsandbytes' linear map of `weight` (out, in)."""
    out, width = weight.shape
    module = modules.Linear4bit(width, out, False, compute_dtype=weight.dtype)
    module.weight = modules.Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", module=module
    ).cuda()
    return module


def step(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(module(x), x, grad)


def milliseconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(WARMUP + TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARMUP:])


if __name__ == "__main__":
    main()
