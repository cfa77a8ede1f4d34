"""Running a model over rows that are there, batch by batch, each process its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from tunesmith.engine.evaluation import measuring
from tunesmith.models.modes import autocasting
from tunesmith.types import R

if TYPE_CHECKING:
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.types import Batch, Collate

T = TypeVar("T")


def over_batches(
    assembled: Assembled,
    peers: Peers,
    rows: Sequence[R],
    output: Callable[[list[R], Batch], T],
) -> list[T]:
    """Return what `output` makes of each batch of `rows`, in their order; all processes get all.

    Args:
        assembled: the run; its batches have `evaluation.batch_size` rows.
        peers: the processes that share the work.
        rows: the same in every process.
        output: takes the rows of a batch and the batch on the device, without gradients and under
            the run's autocast; what it returns travels over the CPU.
    """
    size = assembled.run.evaluation.batch_size
    collate = cast("Collate[R]", assembled.collate)
    found: list[T] = []
    with measuring(assembled.program), autocasting(peers.device, assembled.autocast_dtype):
        for start in range(0, len(rows), size)[peers.rank :: peers.size]:
            some = list(rows[start : start + size])
            found.append(output(some, peers.to_device(collate(some))))
    return interleave(peers.gather(found))


def interleave(shares: Sequence[Sequence[T]]) -> list[T]:
    """Return what processes made of items [rank::size] in the items' order."""
    total = sum(len(share) for share in shares)
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]
