"""The C library's allocator is asked without leaving a mark on it, and never without end."""

import subprocess
import sys

import pytest

from tunesmith.measure import process_heap as module

pytestmark = pytest.mark.skipif(module._library() is None, reason="the C library is not glibc")

START = """
import psutil, torch
from torch import nn
from tunesmith.measure.process_heap import process_heap
from tunesmith.measure.simulated_memory import simulate_step

def step():
    with torch.device("meta"):
        model = nn.Linear(256, 256, bias=False)
    return simulate_step(
        model, lambda: {"x": torch.empty(64, 256)}, lambda b: model(b["x"]).sum(), device="cpu"
    )
"""


def said_by(program: str) -> str:
    """What a fresh process says, whose allocator nothing else has touched."""
    done = subprocess.run(
        [sys.executable, "-c", START + program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_where_the_heap_was_left_nothing_is_asked_for() -> None:
    """After an allocation that fails glibc takes another arena, of which no end is seen: a plan
    took all the mappings that the system gives, and gigabytes with them."""
    program = """
before = step()
try:
    torch.empty(2**50, dtype=torch.uint8)
except RuntimeError:
    pass
used = psutil.Process().memory_info().vms
with process_heap() as heap:
    more = psutil.Process().memory_info().vms - used
print(heap is None, more < 2**28, step()._replace(holes=0) == before._replace(holes=0))
"""
    assert said_by(program) == "True True True"


def test_what_no_machine_has_is_noted_and_not_asked_for() -> None:
    program = """
with process_heap() as heap:
    place = heap.take(2**50)
    print(heap.extent() >= 2**50, heap.peak == heap.extent(), end=" ")
    heap.free(place)
    print(heap.extent() == 0, end=" ")
with process_heap() as heap:
    print(heap is not None)
"""
    assert said_by(program) == "True True True True"


def test_a_large_block_is_noted_as_the_mapping_that_it_would_be() -> None:
    program = """
from tunesmith.measure import process_heap as module

def extent(size):
    with process_heap() as heap:
        place = heap.take(size)
        found = heap.extent()
        heap.free(place)
        assert heap.extent() == 0
    return place < 0, found

sizes = [2**25, 2**25 + 64, 2**26 - 4096, 10**8 // 64 * 64]
noted = [extent(size) for size in sizes]
module._ALWAYS_MAPPED = 2**62
asked = [extent(size) for size in sizes]
print({n for n, _ in noted}, {a for a, _ in asked}, [n for _, n in noted] == [a for _, a in asked])
"""
    assert said_by(program) == "{True} {False} True"
