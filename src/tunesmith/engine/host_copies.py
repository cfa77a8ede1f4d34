"""Tensors that wait for the backward pass in the host's memory, copied while the device computes.

The way there and back runs on a stream of its own, and the tensor that is needed next is fetched
while the one before it is used.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class HostCopies:
    """Where tensors go, and in which order they will be fetched: the last sent is fetched first."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[HostCopy] | None = None

    def send(self, tensor: Tensor) -> HostCopy:
        """Begin to copy `tensor` to the host, and return the copy; the tensor may go then."""
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        copy = HostCopy(tensor, self._stream if tensor.is_cuda else None, self._last)
        self._last = weakref.ref(copy)
        return copy


class HostCopy:
    """One tensor in the host's memory."""

    def __init__(
        self,
        tensor: Tensor,
        stream: torch.cuda.Stream | None,
        before: weakref.ref[HostCopy] | None,
    ) -> None:
        self._device = tensor.device
        self._requires_grad = tensor.requires_grad
        self._stream = stream
        self._before = before
        self._coming: Tensor | None = None
        pinned = stream is not None
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            # The allocator gives this memory to nobody before the copy is done.
            tensor.record_stream(stream)
        with self._aside():
            self._host.copy_(tensor.detach(), non_blocking=True)

    def fetch(self) -> Tensor:
        """Return the tensor on its device again, and begin to fetch the one sent before it."""
        self._begin()
        tensor = self._coming
        assert tensor is not None, "begun above"  # noqa: S101
        self._coming = None
        if self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            tensor.record_stream(now)
        before = None if self._before is None else self._before()
        if before is not None:
            before._begin()
        return tensor.requires_grad_(self._requires_grad)

    def _begin(self) -> None:
        if self._coming is None:
            with self._aside():
                # On the CPU a copy too: who gets the tensor may do with it what it likes.
                self._coming = self._host.to(self._device, non_blocking=True, copy=True)

    def _aside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
