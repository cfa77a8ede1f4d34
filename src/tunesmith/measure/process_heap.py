"""What the C library's allocator makes of tensors that come and go: it is asked, not modelled.

PyTorch's CPU tensors are `posix_memalign`'s. What is freed between two tensors that stay remains
resident, and glibc seldom fits an aligned block into the hole that one of the same size left, so a
process holds more than its tensors. The same requests in the same order, of memory that nobody
writes to and that therefore costs nothing, show how much more.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

_ALIGNMENT: Final = 64
"""Of PyTorch's CPU tensors."""
_SIZES_OF_HOLES: Final = (2**20, 2**18, 2**16)
"""Bytes; smaller holes hold none of the tensors that matter."""
_WORD: Final = ctypes.sizeof(ctypes.c_size_t)
_MAPPED: Final = 2
"""The flag in the size before a block of glibc that it is a mapping of its own."""
_ELSEWHERE: Final = 4
"""The flag there that it is of another arena than the one that sbrk(2) extends."""
_ALWAYS_MAPPED: Final = 2**25
"""Bytes from which glibc makes a mapping of each block, whatever it has learned on the way."""


@cache
def _library() -> Any:
    """Return glibc, or None where another C library is at work."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    library.sbrk.restype = ctypes.c_void_p
    library.sbrk.argtypes = [ctypes.c_ssize_t]
    library.free.argtypes = [ctypes.c_void_p]
    return library


def give_back() -> None:
    """Return to the system what was freed in this process, where the C library is glibc.

    Loading a model, and rounding it above all, leaves holes of the size of its weights.
    """
    if _library() is not None:
        _library().malloc_trim(0)


class ProcessHeap:
    """The allocator of this process, asked for memory that is not used.

    How far heap and mappings reach is followed block by block: mallinfo2(3) tells it too, but walks
    over every hole of the process each time. Of what is surely a mapping only the size is noted:
    where there is no room for it, glibc would turn to another arena in this thread for good.
    """

    def __init__(self) -> None:
        self.peak = 0
        """The most bytes that heap and mappings grew by."""
        self._mapped = 0
        self._heap = _heap_end()

    def take(self, size: int) -> int | None:
        """Ask for `size` bytes, and return where they are; None where they are not to be had.

        A mapping that was not asked for is nowhere, and the negative number of its bytes stands
        for its place.
        """
        if size >= _ALWAYS_MAPPED:
            mapped = -(-(size + _ALIGNMENT + 7 * _WORD) // mmap.PAGESIZE) * mmap.PAGESIZE
            self._mapped += mapped
            self.peak = max(self.peak, self.extent())
            return -mapped
        place = ctypes.c_void_p()
        failed = _library().posix_memalign(
            ctypes.byref(place), ctypes.c_size_t(_ALIGNMENT), ctypes.c_size_t(size)
        )
        if failed or place.value is None:
            return None
        self._mapped += _mapping(place.value)
        self.peak = max(self.peak, self.extent())
        return place.value

    def free(self, place: int | None) -> None:
        """Give back what `take` returned."""
        if place is not None and place < 0:
            self._mapped += place
        elif place is not None:
            self._mapped -= _mapping(place)
            _library().free(place)

    def extent(self) -> int:
        """Return the bytes that heap and mappings are larger than at first."""
        return _heap_end() - self._heap + self._mapped


def _heap_end() -> int:
    return int(_library().sbrk(0))


def _mapping(place: int) -> int:
    """Return the bytes of the mapping that a block is; 0 of one in the heap.

    Before a block of glibc stand what lies unused before it, if it is a mapping, and its size, of
    which the last three bits are flags.
    """
    unused, size = (ctypes.c_size_t.from_address(place - n * _WORD).value for n in (2, 1))
    return unused + (size & ~7) if size & _MAPPED else 0


def _is_elsewhere(place: int) -> bool:
    """Return whether a block is neither a mapping nor where sbrk(2) makes room."""
    size = ctypes.c_size_t.from_address(place - _WORD).value
    return bool(size & _ELSEWHERE) or (not size & _MAPPED and place >= _heap_end())


@contextmanager
def process_heap() -> Iterator[ProcessHeap | None]:
    """Give the allocator without the holes of now, inside a `with` block; None but for glibc.

    Holes that this process happens to have would be filled first, and the heap not seen to grow.
    None also where this thread's memory comes from elsewhere: after an allocation that failed,
    glibc leaves the heap for another arena, whose extent nobody tells.
    """
    if _library() is None:
        yield None
        return
    heap = ProcessHeap()
    filling, grows = _fill(heap)
    try:
        yield ProcessHeap() if grows else None
    finally:
        for place in filling:
            heap.free(place)


def _fill(heap: ProcessHeap) -> tuple[list[int], bool]:
    """Take memory until no hole of 64 KiB is left; return where it is, and if the rest will be new.

    Memory from elsewhere would never be seen to grow, so there would be no end to it.
    """
    taken: list[int] = []
    for size in _SIZES_OF_HOLES:
        before = heap.extent()
        while (place := heap.take(size)) is not None:
            elsewhere = _is_elsewhere(place)
            if elsewhere or heap.extent() > before:
                heap.free(place)
                break
            taken.append(place)
        if place is None or elsewhere:
            return taken, False
    return taken, True
