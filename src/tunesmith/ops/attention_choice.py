"""Which attention kernel is the fastest for a shape, measured on the device at hand."""

from __future__ import annotations

import statistics
import warnings
from typing import Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tunesmith.ops.equal_segments import equal_segments
from tunesmith.ops.segment_attention import segment_attention

Backend: TypeAlias = Literal["cudnn", "flash", "efficient", "varlen", "math"]
CANDIDATES: Final[tuple[Backend, ...]] = ("cudnn", "flash", "efficient", "varlen")
"""Those worth measuring; `math` holds all scores at once."""
_CHECKED: Final = 256
"""Tokens of the segments that are compared with the plain formula."""
_TOLERANCE: Final = 0.05
"""Of the largest element; bfloat16 rounds to 0.4 %, and sums of such errors stay far below."""
_RUNS: Final = 5


class Shape(NamedTuple):
    """What a layer attends over: segments of equal length."""

    segments: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


def attend(q: Tensor, k: Tensor, v: Tensor, length: int, *, backend: Backend) -> Tensor:
    """Return causal attention within segments of `length` tokens, by this kernel and no other.

    Shapes are those of `equal_segments`.

    Raises:
        RuntimeError: the kernel cannot.
    """
    if backend != "varlen":
        return equal_segments(q, k, v, length, backend=backend, or_another=False)
    bounds = torch.arange(0, q.shape[2] + 1, length, dtype=torch.int32, device=q.device)
    return segment_attention(q, k, v, bounds, max_length=length)


def fastest(shape: Shape, device: torch.device) -> dict[Backend, float]:
    """Return the seconds of forward and backward of every kernel that works, fastest first.

    A kernel works if it takes the shape and gives the values and gradients of the plain formula on
    a short piece of it.

    Args:
        shape: of the layers.
        device: a CUDA device.
    """
    found: dict[Backend, float] = {}
    for backend in CANDIDATES:
        try:
            # PyTorch warns of every reason why a kernel is refused.
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                if _is_right(shape, device, backend):
                    found[backend] = _seconds(shape, device, backend)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        # PyTorch's kernels refuse what they cannot do by RuntimeError.
        except RuntimeError:
            continue
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _inputs(shape: Shape, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    tokens = shape.segments * shape.length
    return [
        torch.randn(
            1,
            tokens,
            heads,
            shape.head_dim,
            dtype=shape.dtype,
            device=device,
            generator=generator,
        )
        .transpose(1, 2)  # as projections give them
        .requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]


def _is_right(shape: Shape, device: torch.device, backend: Backend) -> bool:
    short = shape._replace(segments=min(2, shape.segments), length=min(_CHECKED, shape.length))
    inputs = _inputs(short, device)
    plain = [x.detach().float().requires_grad_() for x in inputs]
    ours = _with_gradients(inputs, short.length, backend)
    expected = _with_gradients(plain, short.length, "math")
    return all(
        float((mine.float() - its).abs().max()) <= _TOLERANCE * float(its.abs().max())
        for mine, its in zip(ours, expected, strict=True)
    )


def _with_gradients(inputs: list[Tensor], length: int, backend: Backend) -> list[Tensor]:
    q, k, v = inputs
    out = attend(q, k, v, length, backend=backend)
    # The output as its own gradient weighs every element otherwise than its neighbours.
    return [out.detach(), *torch.autograd.grad(out, inputs, out.detach())]


def _seconds(shape: Shape, device: torch.device, backend: Backend) -> float:
    inputs = _inputs(shape, device)
    times = []
    stream = torch.cuda.current_stream(device)
    for _ in range(_RUNS + 2):
        start, end = (_event() for _ in range(2))
        start.record(stream)
        _with_gradients(inputs, shape.length, backend)
        end.record(stream)
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
