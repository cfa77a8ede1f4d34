"""The parts of a head that runs over a few positions at a time: cutting, softmax, gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, NamedTuple

import torch
from torch import Tensor

# Logits held at once. On a CPU 2**24 float32 are 64 MiB; a GPU needs larger products to be busy: a
# step measured 2 % faster with 512 MiB in bfloat16 than with half of that.
_CHUNK_ELEMENTS = {"cpu": 2**24, "other": 2**28}
# Softmax runs over so few rows at a time that they stay in a CPU's cache; a GPU takes the chunk.
_BLOCK_ELEMENTS = {"cpu": 2**19, "other": 2**27}


_PLANNED: Final[ContextVar[str | None]] = ContextVar("planned", default=None)


@contextmanager
def sized_for(device_type: str) -> Iterator[None]:
    """Cut as on such a device inside a `with` block, wherever the tensors are: to simulate it."""
    token = _PLANNED.set(device_type)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def device_type(tensor: Tensor) -> str:
    """Return where `tensor` lies, or would lie in what `sized_for` simulates."""
    return _PLANNED.get() or tensor.device.type


def simulating() -> bool:
    """Return whether `sized_for` is at work, so that only sizes count."""
    return _PLANNED.get() is not None


class Head(NamedTuple):
    """The output embedding: z = h W^T + b."""

    weight: Tensor
    """(vocab, width)."""
    bias: Tensor | None
    """(vocab,)."""

    def cast(self, dtype: torch.dtype) -> "Head":
        """Return the head outside the graph in `dtype`; nothing is copied where it has it."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return Head(self.weight.detach().to(dtype), bias)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return what the products run in: autocast's dtype, or the wider one of the two inputs'."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what softmax and sums run in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def chunks(rows: int, weight: Tensor, chunk_size: int | None) -> list[slice]:
    """Cut `rows` into equal chunks, so that none is a small and slow rest."""
    limit = chunk_size or _rows_within(_CHUNK_ELEMENTS, weight)
    size = -(-rows // max(1, -(-rows // limit)))
    return [slice(start, start + size) for start in range(0, rows, max(1, size))]


def blocks(chunk: slice, rows: int, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks of a chunk: their place among all rows, and within the chunk."""
    size = _rows_within(_BLOCK_ELEMENTS, weight)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield slice(chunk.start + start, chunk.start + stop), slice(start, stop)


def _rows_within(elements: dict[str, int], weight: Tensor) -> int:
    limit = elements.get(device_type(weight), elements["other"])
    return max(1, limit // weight.shape[0])


class Softmax(NamedTuple):
    """What a block of logits z, (rows, vocab), says; all in float32 or float64."""

    logits: Tensor
    """(rows, vocab), capped."""
    p: Tensor
    """(rows, vocab)."""
    log_sum: Tensor
    """(rows, 1): log sum exp z."""

    @classmethod
    def of(cls, raw: Tensor, softcap: float | None) -> "Softmax":
        """Return the softmax of `raw`, (rows, vocab); float32 `raw` is shared, not copied."""
        logits = raw.to(exact_dtype(raw.dtype))
        if softcap is not None:
            logits = (logits / softcap).tanh_().mul_(softcap)
        p = torch.softmax(logits, dim=-1)
        # The largest p is exp(max z) / sum exp z, and at least 1 / vocab: its log is exact enough.
        return cls(logits, p, logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log())

    def log_probs(self, labels: Tensor) -> Tensor:
        """Return log p(label) of each row, (rows,)."""
        return (self.logits.gather(-1, labels[:, None]) - self.log_sum).squeeze(-1)

    def entropy(self) -> Tensor:
        """Return H = log sum exp z - sum p z of each row, (rows,)."""
        return self.log_sum.squeeze(-1) - torch.linalg.vecdot(self.p, self.logits)

    def surprise(self) -> Tensor:
        """Return log p + H, (rows, vocab): -p times this is the gradient of H by the logits."""
        return self.logits - self.log_sum + self.entropy()[:, None]

    def uncapped(self, gradient: Tensor, softcap: float | None) -> Tensor:
        """Lead a gradient back through z -> c tanh(z / c); `gradient` is overwritten."""
        if softcap is None:
            return gradient
        return gradient.mul_(1 - (self.logits / softcap).square_())


class Gradients(NamedTuple):
    """What the chunks' gradients add up to, each None where it is not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def start(cls, hidden: Tensor, head: Head, needed: Sequence[bool]) -> "Gradients":
        """Return room for the gradients needed by `hidden`, weight and bias, in this order."""
        exact = exact_dtype(hidden.dtype)
        return cls(
            torch.empty_like(hidden) if needed[0] else None,
            torch.zeros_like(head.weight, dtype=exact) if needed[1] else None,
            hidden.new_zeros(len(head.weight), dtype=exact) if needed[2] else None,
        )

    def add(self, chunk: slice, by_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Take in a chunk: the gradient by its logits, (rows, vocab), and its hidden states."""
        if self.hidden is not None:
            torch.mm(by_logits, weight, out=self.hidden[chunk])
        if self.weight is not None:
            _add_product(self.weight, by_logits.T, hidden[chunk])
        if self.bias is not None:
            self.bias.add_(by_logits.sum(0, dtype=self.bias.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total`; on a GPU the product is never rounded, nor written by itself."""
    if total.is_cuda and total.dtype == torch.float32 != a.dtype:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(a @ b)
