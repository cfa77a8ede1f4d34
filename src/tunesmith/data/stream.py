"""Rows of training out of tables on disk: epoch after epoch, resumable at any row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.mixing import epoch_counts, epoch_order
from tunesmith.data.packing import WINDOW, pack
from tunesmith.data.rows import TokenRow, join
from tunesmith.data.settings import DataSettings
from tunesmith.data.statistics import DataReport
from tunesmith.errors import DataError
from tunesmith.types import JSON


class Samples(Protocol):
    """What is streamed: samples by their number, source after source."""

    @property
    def max_length(self) -> int:
        """Tokens a sample may have."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each source."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, (samples,) int64."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> TokenRow:
        """Return sample `index`."""

    def report(self) -> DataReport:
        """Return what the samples are like."""


class EpochStream:
    """An endless order of rows in which each epoch follows from seed and epoch number alone.

    So a state is two numbers, and going to any place costs one epoch's plan.
    """

    def __init__(
        self,
        corpus: Samples,
        *,
        seed: int,
        weights: Sequence[float] = (),
        mixing: Literal["concatenate", "weighted"] = "concatenate",
        shuffle: bool = True,
        packing: bool = False,
    ) -> None:
        self.corpus = corpus
        self._seed = seed
        self._shuffle = shuffle
        self._packing = packing
        self._counts = epoch_counts(corpus.sizes, weights or [1.0] * len(corpus.sizes), mixing)
        self._epoch = 0
        self._position = 0
        self._plan = self._plan_of(0)
        self._rows_per_epoch = len(self._plan)

    @classmethod
    def of(cls, corpus: Samples, settings: DataSettings, *, seed: int) -> EpochStream:
        """Return the order that the `data` part of a run file asks for."""
        return cls(
            corpus,
            seed=seed,
            weights=[source.weight for source in settings.train],
            mixing=settings.mixing,
            shuffle=settings.shuffle,
            packing=settings.packing,
        )

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; with packing, later epochs differ from it by a few."""
        return self._rows_per_epoch

    @property
    def epoch(self) -> float:
        """Epochs taken so far."""
        return self._epoch + self._position / len(self._plan)

    def take(self, count: int) -> list[TokenRow]:
        """Return the next `count` rows, going on into the next epoch where one ends."""
        rows = []
        for _ in range(count):
            if self._position == len(self._plan):
                self._go_to(self._epoch + 1, 0)
            members = self._plan.row(self._position)
            rows.append(join([self.corpus.row(index) for index in members]))
            self._position += 1
        return rows

    def peek(self, count: int) -> list[TokenRow]:
        """Return the next `count` rows without taking them."""
        state = self.state_dict()
        rows = self.take(count)
        self.load_state_dict(state)
        return rows

    def state_dict(self) -> dict[str, JSON]:
        """Return the place, and the size of the data by which other data is noticed."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "samples": len(self.corpus),
            "tokens": int(self.corpus.lengths.sum()),
        }

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """Go to the place where `state` was taken.

        Raises:
            DataError: the state was taken over other data.
        """
        own = self.state_dict()
        for key in ("samples", "tokens"):
            if state.get(key) != own[key]:
                raise DataError(
                    f"the checkpoint was made with {state.get(key)} {key} of training data, and "
                    f"there are {own[key]} now; resume with the same data and data settings"
                )
        self._go_to(int(str(state["epoch"])), int(str(state["position"])))

    def report(self) -> DataReport:
        """Return what the samples are like."""
        return self.corpus.report()

    def _go_to(self, epoch: int, position: int) -> None:
        if epoch != self._epoch:
            self._plan = self._plan_of(epoch)
        self._epoch, self._position = epoch, position

    def _plan_of(self, epoch: int) -> Plan:
        order = epoch_order(
            self.corpus.sizes, self._counts, seed=self._seed, epoch=epoch, shuffle=self._shuffle
        )
        if not self._packing:
            return Plan(order, np.arange(len(order) + 1))
        return packed(order, self.corpus.lengths[order], self.corpus.max_length)


class Plan(NamedTuple):
    """The rows of an epoch, as flat arrays: an epoch may have many millions."""

    samples: NDArray[np.int64]
    """(samples,) int64, row after row."""
    bounds: NDArray[np.int64]
    """(rows + 1,) int64: where each row begins in `samples`."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, index: int) -> list[int]:
        """Return the samples of a row."""
        found: list[int] = self.samples[self.bounds[index] : self.bounds[index + 1]].tolist()
        return found


def packed(order: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> Plan:
    """Return the rows that samples are packed into, window by window of their order.

    Args:
        order: (samples,) int64: the samples.
        lengths: (samples,) int64: their tokens, in the same order.
        capacity: tokens a row holds.
    """
    members: list[NDArray[np.int64]] = []
    sizes: list[int] = [0]
    for start in range(0, len(order), WINDOW):
        window = slice(start, start + WINDOW)
        bins = pack(lengths[window].tolist(), capacity)
        members.append(order[window][[sample for row in bins for sample in row]])
        sizes += [len(row) for row in bins]
    return Plan(np.concatenate(members), np.cumsum(sizes))
