"""Filling rows with several samples: best fit, longest first, within windows of the order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

WINDOW: Final = 1024
"""Samples that are packed together: more fill rows better and shuffle less."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of sample numbers whose lengths sum to at most `capacity` each.

    Best fit decreasing: samples go, longest first, to the fullest bin that still has room. Every
    sample is in exactly one bin and none is split. Bins come in the order of their first sample and
    samples inside a bin in theirs, so a shuffled order stays shuffled.

    Args:
        lengths: tokens of each sample, each at most `capacity`.
        capacity: tokens a bin holds.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), ascending
    for sample in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[sample]
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            bins.append([])
            room, target = capacity, len(bins) - 1
        else:
            room, target = rooms.pop(place)
        bins[target].append(sample)
        insort(rooms, (room - length, target))
    return sorted(sorted(members) for members in bins)
