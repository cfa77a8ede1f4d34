"""The loss over held-out rows, without gradients and without disturbing training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from tunesmith.errors import DataError
from tunesmith.models.modes import autocasting, evaluating
from tunesmith.types import R

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.engine.distribution import Peers
    from tunesmith.types import Collate, LossTerms


def mean_loss(
    module: nn.Module,
    rows: Sequence[R],
    collate: Collate[R],
    *,
    batch_size: int,
    peers: Peers,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Return `loss` and the objective's metrics, each a mean over all that is counted in `rows`.

    Every process measures its share of the rows; sums are float64. Each process must be able to
    run `module` by itself, which inside `Task.evaluate` is always so.

    Args:
        module: maps a batch to LossTerms.
        rows: the rows to measure, the same in every process.
        collate: makes a batch of rows.
        batch_size: rows a process takes at once.
        peers: the processes that share the work.
        autocast_dtype: computes the forward under autocast in this dtype.

    Raises:
        DataError: nothing in `rows` is counted, so there is no mean.
    """
    shares = range(0, len(rows), batch_size)[peers.rank :: peers.size]
    sums: dict[str, Tensor] = {}
    count = 0.0
    with measuring(module):
        for start in shares:
            batch = peers.to_device(collate(list(rows[start : start + batch_size])))
            with autocasting(peers.device, autocast_dtype):
                terms: LossTerms = module(batch)
            count += terms.count
            for name, value in (("loss", terms.total), *terms.metrics.items()):
                # Brought to the CPU at the end only; MPS has no float64.
                wide = value if value.device.type == "mps" else value.double()
                sums[name] = sums[name] + wide if name in sums else wide
    return _means({name: value.item() for name, value in sums.items()}, count, peers)


def _means(sums: dict[str, float], count: float, peers: Peers) -> dict[str, float]:
    # A process without a share knows no names, so names and sums travel together.
    shares = peers.gather((sums, count))
    counted = sum(part for _, part in shares)
    if counted == 0:
        raise DataError(
            "the evaluation rows hold nothing that counts towards the loss (no supervised token); "
            "check data.evaluation and data.supervise"
        )
    names = dict.fromkeys(name for part, _ in shares for name in part)
    return {name: sum(part.get(name, 0.0) for part, _ in shares) / counted for name in names}


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """Put `module` in eval mode without gradients, and back into the mode each part had."""
    with evaluating(module), torch.no_grad():
        yield
