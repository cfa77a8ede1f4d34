"""Devices and processes: who takes part, and how a model is spread over them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tunesmith.errors import SetupError

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.engine.settings import EngineSettings
    from tunesmith.types import Batch, LossTerms

T = TypeVar("T")
ON_CPU = frozenset({"cu_seq_lens_q", "cu_seq_lens_k"})
"""Parts of a batch that stay on the CPU: attention reads them there, without waiting."""


@dataclass(frozen=True)
class Peers:
    """The processes of a run. What they agree on travels over the CPU, so no GPU has to wait."""

    device: torch.device
    """What this process computes on."""
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    """A group that speaks gloo; None for a single process."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each of `values` summed over all processes (in float64)."""
        if self.size == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(packed, group=self.control)
        return packed.tolist()

    def any(self, flag: bool, /) -> bool:
        """Return whether `flag` is set in any process."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def to_device(self, batch: Batch) -> Batch:
        """Return `batch` with its tensors on this process's device."""
        return {key: value if key in ON_CPU else self._there(value) for key, value in batch.items()}

    def _there(self, value: Any) -> Any:
        if isinstance(value, dict):  # a batch beside the batch
            return self.to_device(value)
        return self._moved(value) if isinstance(value, torch.Tensor) else value

    def _moved(self, value: Tensor) -> Tensor:
        # From memory that the system may move, the host would wait for the device's turn.
        pinned = value.pin_memory() if self.device.type == "cuda" and not value.is_cuda else value
        return pinned.to(self.device, non_blocking=True)


def connect(settings: EngineSettings) -> Peers:
    """Join the processes that torchrun or accelerate started, and take a device.

    Raises:
        SetupError: `engine.device` names a device that this machine lacks.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    there = [name for name, present in available.items() if present]
    chosen = there[0] if settings.device == "auto" else settings.device
    if chosen not in there:
        raise SetupError(
            f"engine.device: '{chosen}' is not available here; use auto or one of "
            f"{', '.join(there)}"
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # accelerate settles this once in a process; what it says of a single process is not asked for,
    # since a later call may choose another device.
    state = PartialState(cpu=chosen == "cpu")
    several = state.num_processes > 1
    device = state.device if several and chosen != "cpu" else torch.device(chosen)
    if device.type != chosen:
        raise SetupError(
            f"engine.device: '{chosen}' cannot follow '{device.type}' while several processes are "
            "connected; start them anew"
        )
    control = None
    if several:
        control = (
            dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        )
    return Peers(device, state.process_index, state.num_processes, control)


class Alone:
    """A model in one process."""

    can_retry = True
    """Whether a micro-batch that ran out of memory can be tried again."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, batch: Batch) -> LossTerms:
        """Run the module on this process's batch."""
        terms: LossTerms = self._module(batch)
        return terms

    def unsynced(self) -> AbstractContextManager[None]:
        """Keep the gradients of this backward in this process."""
        return nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Have all weights whole in this process, so that it may compute without the others."""
        return nullcontext()

    def give_up(self) -> None:
        """Forget the forward of a step that is tried again; all processes have to call."""

    def finish(self) -> None:
        """Leave the model whole for good."""


class Replicated(Alone):
    """A copy in every process, gradients averaged (DDP, Li et al. 2020, arXiv:2006.15704)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._replica = _replicate(module)

    def __call__(self, batch: Batch) -> LossTerms:
        """Run the module on this process's batch."""
        terms: LossTerms = self._replica(batch)
        return terms

    def unsynced(self) -> AbstractContextManager[None]:
        """Keep the gradients of this backward in this process."""
        return self._replica.no_sync()

    def give_up(self) -> None:
        """Forget the forward of a step that is tried again; all processes have to call."""
        # DDP expects the backward of that forward, and would take the next one for it.
        del self._replica
        self._replica = _replicate(self._module)


def _replicate(module: nn.Module) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # The new name of broadcast_buffers is younger than the oldest PyTorch that is supported.
        warnings.simplefilter("ignore", FutureWarning)
        # Without device_ids, or DDP would move the sequence lengths to the GPU. Without buffers,
        # or a forward would wait for processes that ran out of memory.
        return DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True
        )


@dataclass(frozen=True)
class _Parcel:
    """A batch that FSDP does not look into: it would move the sequence lengths to the GPU."""

    batch: Batch


class _Root(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, parcel: _Parcel) -> LossTerms:
        terms: LossTerms = self.module(parcel.batch)
        return terms


class Sharded(Alone):
    """Weights, gradients and optimiser in pieces (FSDP2; Zhao et al. 2023, arXiv:2304.11277)."""

    can_retry = False

    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module], device: torch.device
    ) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        # The root holds embedding and head, which the backward needs at once.
        root = _Root(module)
        self._root = fully_shard(root, mesh=mesh, reshard_after_forward=False)
        self._parts = [part for part in root.modules() if isinstance(part, FSDPModule)]
        super().__init__(root)

    def __call__(self, batch: Batch) -> LossTerms:
        """Run the module on this process's batch."""
        terms: LossTerms = self._module(_Parcel(batch))
        return terms

    @contextmanager
    def unsynced(self) -> Iterator[None]:
        """Keep the gradients of this backward in this process."""
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all weights whole in this process, so that it may compute without the others."""
        self.finish()
        try:
            yield
        finally:
            for part in self._parts:
                part.set_reshard_after_forward(part is not self._root, recurse=False)
                part.reshard()
            # The next backward would gather, after its own, what was called last in here, which
            # is nothing in a process that had no share of the work: the others wait in vain.
            self._root._get_fsdp_state()._comm_ctx.post_forward_order.clear()

    def finish(self) -> None:
        """Leave the model whole for good."""
        # A block called before the root would take itself for the root, and the root then fails.
        self._root._get_fsdp_state()._lazy_init()
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        for module in self._module.modules():
            _let_states_be_whole(module)


def _let_states_be_whole(module: nn.Module) -> None:
    """Keep FSDP from sharding the weights of `module` again as soon as its state is asked for."""
    hooks = module._state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if hook.__module__.startswith("torch.distributed.fsdp"):
            del hooks[key]


def spread(
    module: nn.Module, blocks: Sequence[nn.Module], settings: EngineSettings, peers: Peers
) -> Alone:
    """Spread `module` over the processes as `engine.distribution` says."""
    if peers.size == 1:
        return Alone(module)
    if settings.distribution == "fsdp":
        return Sharded(module, blocks, peers.device)
    return Replicated(module)


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded, on the CPU; every process has to call."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def like(source: Tensor, target: Tensor) -> Tensor:
    """Return `source`, whole in every process, on the device and in the sharding of `target`."""
    moved = source.to(target.device)
    if isinstance(target, DTensor):
        # src_data_rank=None: everyone has the whole and cuts its own piece.
        return distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)
    return moved
