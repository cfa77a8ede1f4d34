"""The memory of a training step, found by running it on tensors that have shapes but no data.

Every operation runs as in training, its attention, its autograd and its checkpointing too, while
each tensor's bytes are counted from the operation that makes it to the moment nobody holds it. So
nothing has to be known about an architecture or a method, and nothing has to be loaded. What else a
process does before the step, on the same memory, is simulated alike.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


class PhaseMemory(NamedTuple):
    """Bytes of something that is done before the step, beside the parameters."""

    peak: int
    """The most at any moment."""
    kept: int
    """Of what was asked about at its end."""
    holes: int = 0
    """On the CPU, what the process holds beyond the peak."""


class Simulation:
    """A process that computes without data; made by `simulation`."""

    def __init__(
        self, models: Sequence[nn.Module], live: _Pretending, heap: ProcessHeap | None
    ) -> None:
        self._models = models
        self._live = live
        self._heap = heap
        self.parameters = live.now
        """Of all models, with their buffers."""
        self._held = live.now

    def phase(
        self,
        call: Callable[[Live], Iterable[Tensor]],
        *,
        autocast: torch.dtype | None = None,
        padded: bool = False,
    ) -> PhaseMemory:
        """Return the memory of something done without gradients.

        Args:
            call: does it, and returns the tensors to ask about at its end.
            autocast: its dtype, where it computes under it.
            padded: whether masks of tokens let through not all.
        """
        live = self._began()
        live.padded = padded
        with live, torch.no_grad(), _autocast(autocast):
            kept = live.bytes_of(call(live))
        live.padded = False
        gc.collect()  # a decoder holds itself, and with it the cache
        return PhaseMemory(live.peak - self._held, kept, self._holes())

    def step(
        self, loss: Callable[[], Tensor], *, autocast: torch.dtype | None = None
    ) -> StepMemory:
        """Return the memory of a forward pass, which gives a loss (), and its backward pass."""
        live, more = self._began(), self._held - self.parameters
        with live, _autocast(autocast):
            total = loss()
            after_forward = live.now
        with live:
            total.backward()  # type: ignore[no-untyped-call]
            del total
        found = StepMemory(
            self.parameters,
            after_forward - more,
            live.peak - more,
            live.now - self._held,
            self._holes(),
        )
        self._end_step()
        return found

    def _end_step(self) -> None:
        """Make the optimiser's state, if there is none yet, and let go of the gradients."""
        trainable = [p for m in self._models for p in m.parameters() if p.grad is not None]
        if self._held == self.parameters:
            for parameter in trainable:
                for _ in range(2):
                    self._live.take(parameter.nbytes)
        for parameter in trainable:
            parameter.grad = None
        self._held = self._live.now

    def _began(self) -> _Pretending:
        self._live.peak = self._live.now
        if self._heap:
            self._heap.peak = self._heap.extent()
        return self._live

    def _holes(self) -> int:
        return max(0, self._heap.peak - self._live.peak) if self._heap else 0


@contextmanager
def simulation(
    models: Sequence[nn.Module], *, device: str = "cuda", chosen: Mapping[int, int] | None = None
) -> Iterator[Simulation]:
    """Give a process that holds `models` and computes without data, inside a `with` block.

    Args:
        models: on the meta device, with their methods attached and in the modes they compute in;
            their parameters are no longer usable afterwards.
        device: `cuda` or `cpu`: whose allocator rounds, and whose sizes the loss is cut into.
        chosen: of a mask of so many places, how many it lets through; of others all.
    """
    asked = process_heap() if device == "cpu" else nullcontext()
    with asked as heap, FakeTensorMode(), sized_for(device):
        _give_storage(models)
        live = _Pretending(ROUNDING[device], heap)
        live.chosen = dict(chosen or {})
        for model in models:
            live.take_all([*model.parameters(), *model.buffers()])
        yield Simulation(models, live, heap)


def simulate_step(
    model: nn.Module,
    inputs: Callable[[], Batch],
    loss: Callable[[Batch], Tensor],
    *,
    autocast: torch.dtype | None = None,
    device: str = "cuda",
) -> StepMemory:
    """Return the memory of a forward and a backward pass of `model` alone.

    Args:
        model: as `simulation` takes it.
        inputs: makes the batch; called where tensors have no data.
        loss: maps the batch to a loss () that depends on the parameters of `model`.
        autocast: dtype of autocast, where the run computes under it.
        device: as `simulation` takes it.
    """
    with simulation([model], device=device) as simulated:
        return simulated.step(lambda: loss(inputs()), autocast=autocast)


def bytes_left(call: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors besides `held` that the result of `call` keeps for backward.

    Of a real call, on real tensors. A process cannot tell: what is freed on the CPU stays resident,
    and the next tensor takes its place unseen.
    """
    live = Live(ROUNDING["cpu"])
    live.take_all(held)
    before = live.now
    with live:
        kept = call()
        left = live.now - before
    del kept
    return left


def _give_storage(models: Sequence[nn.Module]) -> None:
    """Put tensors with a device, but without data, in the place of those on the meta device."""
    made: dict[int, Tensor] = {}
    for module in (module for model in models for module in model.modules()):
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


class Event(NamedTuple):
    """A storage comes into being, or goes."""

    number: int
    """Of the storage."""
    size: int | None
    """In bytes; None where it goes."""


class _Held(NamedTuple):
    size: int
    place: int | None


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that somebody holds."""

    def __init__(self, rounding: int, heap: ProcessHeap | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rounding = rounding
        self._heap = heap
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}
        self._held: dict[int, _Held] = {}
        self._count = 0
        self._log: list[Event] | None = None

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
                self._known[key] = number = self.take(storage.nbytes())
                weakref.finalize(storage, self._gone, key, number)

    def take(self, size: int) -> int:
        """Count so many bytes, and return the number that they go by."""
        number, self._count = self._count, self._count + 1
        self._held[number] = self._taken(size)
        if self._log is not None:
            self._log.append(Event(number, size))
        return number

    def drop(self, number: int) -> None:
        """Count what goes by `number` no more."""
        held = self._held.pop(number)
        self.now -= held.size
        if self._heap:
            self._heap.free(held.place)
        if self._log is not None:
            self._log.append(Event(number, None))

    def holds(self, number: int) -> bool:
        """Return whether what goes by `number` is counted."""
        return number in self._held

    def stand_for(self, number: int, other: int) -> None:
        """Let what goes by `other` go by `number` from now on, which was dropped."""
        self._held[number] = self._held.pop(other)

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Return the counted bytes of the storages of `tensors`."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(self._held[self._known[key]].size for key in keys)

    @contextmanager
    def logged(self) -> Iterator[list[Event]]:
        """Give what comes and goes inside a `with` block, in its order."""
        log: list[Event] = []
        self._log = log
        try:
            yield log
        finally:
            self._log = None

    def _taken(self, size: int) -> _Held:
        rounded = -(-size // self._rounding) * self._rounding
        self.now += rounded
        self.peak = max(self.peak, self.now)
        return _Held(rounded, self._heap.take(rounded) if self._heap else None)

    def _gone(self, key: int, number: int) -> None:
        del self._known[key]
        self.drop(number)


class _Pretending(Live):  # type: ignore[no-untyped-call]
    """The same where tensors have no data."""

    chosen: dict[int, int]
    padded = False
    """Whether masks let through not all, where a model asks."""

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation; those that look at data get the answer of a full batch."""
        if func is torch.ops.aten.nonzero.default:
            return self._places(args[0])
        if func is torch.ops.aten._local_scalar_dense.default:
            return int(not (self.padded and args[0].dtype == torch.bool))
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped(*args[:3])
        if func in _BY_PLACE:
            return func(args[0], self._by_place(args[1]), *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _places(self, mask: Tensor) -> Tensor:
        """Return room for the places that `mask` lets through, (places, dimensions) int64."""
        count = self.chosen.get(mask.numel(), mask.numel())
        return mask.new_empty((count, mask.dim()), dtype=torch.int64)

    def _by_place(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                found += self._places(index).unbind(1)
            else:
                found.append(index)
        return found


_BY_PLACE: Final = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}
"""Operations whose second argument may be masks, which say by their data what comes out."""
