"""The memory of one training step, found by running it on tensors that have shapes but no data.

Every operation runs as in training, its attention, its autograd and its checkpointing too, while
each tensor's bytes are counted from the operation that makes it to the moment nobody holds it. So
nothing has to be known about an architecture or a method, and nothing has to be loaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.measure.process_heap import ProcessHeap, process_heap
from tunesmith.ops.chunked_head import sized_for

if TYPE_CHECKING:
    from tunesmith.types import Batch

ROUNDING: Final = {"cuda": 512, "cpu": 64}
"""Bytes that PyTorch's allocators round up to."""


class StepMemory(NamedTuple):
    """Bytes at the moments of a step that matter."""

    parameters: int
    """Parameters and buffers, all that is there before the step."""
    after_forward: int
    """With everything that backward will need."""
    peak: int
    """The most at any moment of forward and backward, gradients included."""
    gradients: int
    """What is left beside the parameters after backward."""
    holes: int = 0
    """On the CPU, what the process holds beyond the peak and can use for nothing of this step."""

    @property
    def activations(self) -> int:
        """Return what forward leaves for backward."""
        return self.after_forward - self.parameters

    @property
    def transient(self) -> int:
        """Return what is needed for a moment beyond parameters, activations and gradients."""
        return self.peak - self.after_forward


def simulate_step(
    model: nn.Module,
    inputs: Callable[[], Batch],
    loss: Callable[[Batch], Tensor],
    *,
    autocast: torch.dtype | None = None,
    device: str = "cuda",
) -> StepMemory:
    """Return the memory of a forward and a backward pass of `model`.

    Args:
        model: on the meta device, with its methods attached and in the mode it trains in; its
            parameters are no longer usable afterwards.
        inputs: makes the batch; called where tensors have no data.
        loss: maps the batch to a loss () that depends on the parameters of `model`.
        autocast: dtype of autocast, where the run computes under it.
        device: `cuda` or `cpu`: whose allocator rounds, and whose sizes the loss is cut into.
    """
    asked = process_heap() if device == "cpu" else nullcontext()
    with asked as heap, FakeTensorMode(), sized_for(device):
        _give_storage(model)
        live = _Pretending(ROUNDING[device], heap)
        live.take_all([*model.parameters(), *model.buffers()])
        parameters = live.now
        with live, _autocast(autocast):
            total = loss(inputs())
            after_forward = live.now
        with live:
            total.backward()  # type: ignore[no-untyped-call]
            del total
        holes = max(0, heap.peak - live.peak) if heap else 0
        return StepMemory(parameters, after_forward, live.peak, live.now - parameters, holes)


def bytes_left(call: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors besides `held` that the result of `call` keeps for backward.

    Of a real call, on real tensors. A process cannot tell: what is freed on the CPU stays resident,
    and the next tensor takes its place unseen.
    """
    live = _Live(ROUNDING["cpu"])
    live.take_all(held)
    before = live.now
    with live:
        kept = call()
        left = live.now - before
    del kept
    return left


def _give_storage(model: nn.Module) -> None:
    """Put tensors with a device, but without data, in the place of those on the meta device."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    made.setdefault(id(tensor), _like(tensor))
                    kind[name] = made[id(tensor)]  # type: ignore[assignment]


def _like(tensor: Tensor) -> Tensor:
    # CPU, whatever the run computes on: PyTorch makes no CUDA tensors without CUDA, and what an
    # operation makes and saves does not depend on the device, but for the attention's workspace.
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def _grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return what the grouped product of a mixture of experts gives, in any dtype.

    Where tensors have no data PyTorch's own takes bfloat16 only. It is `a` (tokens, in) times `b`
    (experts, in, out), or for the weights' gradient (in, tokens) times (tokens, out), and `ends`
    says where one expert's tokens end.
    """
    if a.dim() == b.dim() == 2:
        return a.new_empty(len(ends), a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])


_COUNTED: Final[ContextVar[bool]] = ContextVar("counted", default=True)


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave what is made inside a `with` block out of the count."""
    token = _COUNTED.set(False)
    try:
        yield
    finally:
        _COUNTED.reset(token)


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that somebody holds."""

    def __init__(self, rounding: int, heap: ProcessHeap | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rounding = rounding
        self._heap = heap
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = self.answer(func, args, kwargs or {})
        self.take_all(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation."""
        return func(*args, **kwargs)

    def take_all(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages that are not counted yet."""
        if not _COUNTED.get():
            return
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                size = -(-storage.nbytes() // self._rounding) * self._rounding
                self._known[key] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                place = self._heap.take(size) if self._heap else None
                weakref.finalize(storage, self._drop, key, place)

    def _drop(self, key: int, place: int | None) -> None:
        self.now -= self._known.pop(key)
        if self._heap:
            self._heap.free(place)


class _Pretending(_Live):  # type: ignore[no-untyped-call]
    """The same where tensors have no data."""

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation; those that look at data get the answer of a full batch."""
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped(*args[:3])
        return func(*args, **kwargs)
