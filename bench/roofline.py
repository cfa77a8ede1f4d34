"""What the GPU at hand can do at most, and how near a training step comes: a table and a picture.

    python bench/roofline.py                  # writes bench/results/roofline-<device>.json
    python bench/roofline.py --picture h100   # draws docs/roofline-h100.svg from the results

A ceiling is the best rate of one kind of work alone: matrix products of the shapes of an 8B model
in bfloat16 and fp8, attention, copying. A step's rate is the arithmetic of its matrix products and
its attention, as far as it cannot be left out, over its time.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_job import SHAPES
from gpu_sft import RESULTS, device_slug, machine

PRODUCTS = ((8192, 4096, 14336), (8192, 4096, 4096), (8192, 14336, 4096))
VOCAB = 128256
DOCS = RESULTS.parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", metavar="DEVICE", help="draw what was measured on it")
    arguments = parser.parse_args()
    if arguments.picture:
        print(picture(arguments.picture))
        return
    found = ceilings() | machine() | {"date": time.strftime("%Y-%m-%d")}
    path = RESULTS / f"roofline-{device_slug(found['device_name'])}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def seconds(call: Callable[[], Any], runs: int = 20) -> float:
    """Return how long the GPU takes for `call`, the mean of `runs`."""
    for _ in range(5):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / runs / 1e3


def ceilings() -> dict[str, Any]:
    """Return rates in FLOP/s and bytes/s."""
    made: dict[str, Any] = {"bf16": max(product(*shape) for shape in PRODUCTS)}
    if torch.cuda.get_device_capability() >= (8, 9):
        made["fp8"] = max(product_in_fp8(*shape) for shape in PRODUCTS)
    made["attention"] = attention()
    x = torch.empty(2**30, device="cuda", dtype=torch.bfloat16).normal_()
    y = torch.empty_like(x)
    made["copy"] = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    return made


def product(rows: int, inner: int, out: int) -> float:
    a = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(out, inner, device="cuda", dtype=torch.bfloat16)
    return 2 * rows * inner * out / seconds(lambda: a @ b.T)


def product_in_fp8(rows: int, inner: int, out: int) -> float:
    a = torch.randn(rows, inner, device="cuda").to(torch.float8_e4m3fn)
    b = torch.randn(out, inner, device="cuda").to(torch.float8_e4m3fn)
    scales = {
        "scale_a": torch.ones(rows, 1, device="cuda"),
        "scale_b": torch.ones(1, out, device="cuda"),
    }
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    taken = seconds(lambda: torch._scaled_mm(a, b.T, **scales, **options))
    return 2 * rows * inner * out / taken


def attention() -> dict[str, dict[str, float]]:
    """Return the rates of forward and backward of each kernel, causal, 4 x 32 x 2048 x 128."""
    found = {}
    shape = (4, 32, 2048, 128)
    q, k = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q.requires_grad_()
    k.requires_grad_()
    flop = 4 * 4 * 32 * 2048 * 2048 * 128 / 2
    for name, kernel in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        with sdpa_kernel(kernel):
            attend = F.scaled_dot_product_attention
            forward = seconds(lambda: attend(q, k, k, is_causal=True))  # noqa: B023 - called at once
            out = attend(q, k, k, is_causal=True)
            by_out = torch.randn_like(out)
            back = seconds(
                lambda: torch.autograd.grad(out, (q, k), by_out, retain_graph=True)  # noqa: B023
            )
        found[name] = {"forward": flop / forward, "backward": 2.5 * flop / back}
    return found


def flop_per_token(shape: str, length: int, *, trains_all: bool) -> float:
    """Return the arithmetic of a step for a token, without recomputing anything.

    2 a weight for the forward product, 2 for the gradient by its input, and 2 more for that by the
    weight where it trains; attention as causal: half of the square, and 2.5 times that back.
    """
    made = SHAPES[shape]
    width, inner, layers = (
        made[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    narrow = width * made["num_key_value_heads"] // made["num_attention_heads"]
    weights = layers * (2 * width * width + 2 * width * narrow + 3 * width * inner) + VOCAB * width
    attends = layers * 2 * length * width * 3.5
    return (6 if trains_all else 4) * weights + attends


def picture(device: str) -> Path:
    """Draw the rate of every configuration beside the ceilings, and return where."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "roofline"
    ceiling = json.loads((RESULTS / f"roofline-{device}.json").read_text("utf-8"))
    bars = rates(device)
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.32 * len(bars)), layout="constrained")
    axes.barh([name for name, _ in bars], [rate / 1e12 for _, rate in bars], color="#4878a8")
    for kind, style in (("bf16", "--"), ("fp8", ":")):
        if kind in ceiling:
            axes.axvline(ceiling[kind] / 1e12, color="#333333", linestyle=style)
            place = (ceiling[kind] / 1e12, len(bars) - 0.5)
            axes.annotate(f"{kind} products ", place, va="top", ha="right")
    axes.invert_yaxis()
    axes.set_xlabel(f"TFLOP/s, {ceiling['device_name']}")
    path = DOCS / f"roofline-{device}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def rates(device: str) -> list[tuple[str, float]]:
    """Return what every configuration of the table reached in FLOP/s, the newest of each."""
    newest: dict[str, float] = {}
    for line in json.loads((RESULTS / "gpu_sft.json").read_text("utf-8")):
        known = line.get("row") and line["program"] == "tunesmith" and "failed" not in line
        if not known or device_slug(line["device_name"]) != device or line["data"] != "full":
            continue
        length = int(line["tokens"].split("x")[1])
        need = flop_per_token(line["shape"], length, trains_all=line["method"].startswith("full"))
        products = "float8 products" if line.get("products") == "float8" else "none"
        how = (line["quantize"], products, line["checkpointing"], line["dtype"])
        said = ", ".join(part for part in how if part not in {"none", "auto"})
        name = f"{line['row']} ({said})" if said else line["row"]
        newest[name] = need * line["tokens_per_second"]
    return list(newest.items())


if __name__ == "__main__":
    main()
