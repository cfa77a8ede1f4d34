"""Loss and gradient of a chunk of logits in one pass: plain code that a compiler fuses on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tunesmith.ops.chunked_head import exact_dtype, simulating
from tunesmith.ops.compile_workers import start_compile_workers
from tunesmith.ops.torch_errors import is_of_compiler, memory_error_in

_PLAIN: Final[ContextVar[bool]] = ContextVar("plain", default=False)


@contextmanager
def plain_loss() -> Iterator[None]:
    """Leave the compiler out of the loss inside a `with` block."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Return whether `plain_loss` is at work."""
    return _PLAIN.get()


class ByLogits(NamedTuple):
    """What a chunk of logits comes to."""

    total: Tensor
    """() float32 or float64: the summed loss."""
    correct: Tensor
    """() int64: labels with the largest logit."""
    gradient: Tensor
    """(rows, vocab), dtype of the logits: of the sum by the logits before the cap."""


def loss_by_logits(
    raw: Tensor, labels: Tensor, softcap: float | None, z_loss: float | None
) -> ByLogits:
    """Return the sum of -log p(y) + zeta L^2 over the rows, L = log sum exp z, and its gradient.

    By the capped logits z that is p (1 + 2 zeta L) - onehot(y), and dz / d raw = 1 - (z / c)^2.

    Args:
        raw: (rows, vocab), before the cap.
        labels: (rows,) int64.
        softcap: c of z = c tanh(raw / c).
        z_loss: zeta (PaLM, arXiv:2204.02311, section 5).
    """
    z = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    largest = z.amax(-1, keepdim=True)
    exponentials = (z - largest).exp()
    sums = exponentials.sum(-1, keepdim=True)
    L = largest + sums.log()
    z_y = z.gather(-1, labels[:, None])
    total = (L - z_y).sum()
    p = exponentials / sums
    if z_loss is not None:
        total = total + z_loss * L.square().sum()
        p = p * (1 + 2 * z_loss * L)
    # Of equal logits the first counts as the largest. Whether that is y's needs no search for the
    # place of the largest, which would take longer than all the rest.
    places = torch.arange(z.shape[-1], device=z.device)
    earlier = ((z == largest) & (places < labels[:, None])).any(-1)
    correct = ((z_y == largest).squeeze(-1) & ~earlier).sum()
    onehot = places == labels[:, None]
    gradient = torch.where(onehot, p - 1, p)
    if softcap is not None:
        gradient = gradient * (1 - (z / softcap).square())
    return ByLogits(total, correct, gradient.to(raw.dtype))


def _in_place(raw: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    done = loss_by_logits(raw, *rest)
    raw.copy_(done.gradient)
    return done.total, done.correct


@cache
def _compiled() -> Callable[..., Any]:
    start_compile_workers()
    return torch.compile(_in_place, fullgraph=True)


def fused_loss_by_logits(
    raw: Tensor, labels: Tensor, softcap: float | None, z_loss: float | None
) -> ByLogits:
    """Return what `loss_by_logits` does, from one compiled kernel or two; for a GPU.

    The gradient may take the place of the logits: `raw` is not to be read afterwards. One graph
    serves every number of rows. Where it cannot be compiled, plain code runs after one warning.
    Where memory is simulated, only what the kernel leaves counts.
    """
    if simulating():
        none = raw.new_zeros((), dtype=exact_dtype(raw.dtype))
        return ByLogits(none, labels.new_zeros(()), raw)
    # A range of 0 or 1 rows would be a graph of its own.
    if len(raw) > 1:
        torch._dynamo.maybe_mark_dynamic(raw, 0)
        torch._dynamo.maybe_mark_dynamic(labels, 0)
    try:
        total, correct = _compiled()(raw, labels, softcap, z_loss)
        return ByLogits(total, correct, raw)
    except Exception as error:
        if not is_of_compiler(error):
            raise
        if (inner := memory_error_in(error)) is not None:
            raise inner from error
        _tell_once(str(error).strip().splitlines()[0])
        return loss_by_logits(raw, labels, softcap, z_loss)


@cache
def _tell_once(reason: str) -> None:
    warnings.warn(
        f"the loss runs as plain code, since it cannot be compiled: {reason}", stacklevel=3
    )
