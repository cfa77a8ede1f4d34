"""The steps of decoding: a few are simulated, and the others are like them, a token longer.

A cache that grows is copied in each step, so that on the CPU every step leaves holes of another
size in the heap. All of them are asked of the allocator, which takes no time; to simulate all steps
would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from tunesmith.measure.simulated_memory import Event, Live


class _Place(NamedTuple):
    """What an event is about."""

    ago: int
    """Steps since it came into being."""
    nth: int
    """Among what its step took."""


_TAKES: Final = _Place(-1, -1)
"""The next of what the step takes."""
_EARLIER: Final = _Place(-2, -1)
"""What was there before the first step goes; it does so once."""


class _Step(NamedTuple):
    """What a step did, in its order."""

    numbers: list[int]
    """Of what it took."""
    sizes: list[int]
    """Of the same, in bytes."""
    events: list[_Place]
    """What it let go of, and where it took the next."""


def repeated(live: Live, advance: Callable[[], object], count: int) -> None:
    """Count what `count` calls of `advance` take, of which only the first few are made.

    As soon as two calls in a row do the same with sizes that may differ, the others go on growing
    as these did.

    Args:
        live: counts what `advance` makes.
        advance: takes a step, and lets go of what the step before left.
        count: of steps.
    """
    steps: list[_Step] = []
    for done in range(1, count + 1):
        with live.logged() as log:
            advance()
        steps.append(_step(log, steps))
        if _is_steady(steps):
            _go_on(live, steps, count - done)
            return


def _step(log: Sequence[Event], before: Sequence[_Step]) -> _Step:
    numbers = [event.number for event in log if event.size is not None]
    sizes = [event.size for event in log if event.size is not None]
    known = {
        number: _Place(ago, index)
        for ago, taken in enumerate([numbers, *(step.numbers for step in reversed(before))])
        for index, number in enumerate(taken)
    }
    events = [_TAKES if e.size is not None else known.get(e.number, _EARLIER) for e in log]
    return _Step(numbers, sizes, events)


def _is_steady(steps: Sequence[_Step]) -> bool:
    """Return whether the last two of `steps` did the same, and so would the next one."""
    same = len(steps) > 1 and steps[-1].events == steps[-2].events
    return same and _EARLIER not in steps[-1].events


def _go_on(live: Live, steps: Sequence[_Step], count: int) -> None:
    last = steps[-1]
    growth = [now - then for now, then in zip(last.sizes, steps[-2].sizes, strict=True)]
    taken = [step.numbers for step in steps]
    there = [
        (step, index)
        for step, numbers in enumerate(taken)
        for index, number in enumerate(numbers)
        if live.holds(number)
    ]
    for step in range(1, count + 1):
        own: list[int] = []
        taken.append(own)
        for event in last.events:
            if event == _TAKES:
                index = len(own)
                own.append(live.take(last.sizes[index] + step * growth[index]))
            else:
                live.drop(taken[-1 - event.ago][event.nth])
    # The tensors that are there are those of the last call, and stand for those of the last step.
    for made, index in there:
        if not live.holds(taken[made][index]):
            live.stand_for(taken[made][index], taken[made + count][index])
