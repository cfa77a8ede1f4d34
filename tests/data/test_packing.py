"""Packing and mixing: nothing lost, nothing twice, shares as asked."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.mixing import epoch_counts, epoch_order
from tunesmith.data.packing import pack
from tunesmith.data.stream import packed
from tunesmith.errors import DataError

CAPACITY = 32
lengths = st.lists(st.integers(1, CAPACITY), max_size=200)


@given(lengths)
def test_each_sample_is_packed_exactly_once(sizes: list[int]) -> None:
    members = [sample for row in pack(sizes, CAPACITY) for sample in row]
    assert sorted(members) == list(range(len(sizes)))


@given(lengths)
def test_no_row_overflows(sizes: list[int]) -> None:
    assert all(sum(sizes[s] for s in row) <= CAPACITY for row in pack(sizes, CAPACITY))


@given(lengths)
def test_rows_come_in_the_order_of_their_first_samples(sizes: list[int]) -> None:
    rows = pack(sizes, CAPACITY)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(row == sorted(row) for row in rows)


@given(lengths)
def test_no_two_rows_could_be_one(sizes: list[int]) -> None:
    fills = sorted(sum(sizes[s] for s in row) for row in pack(sizes, CAPACITY))
    assert len(fills) < 2 or fills[0] + fills[1] > CAPACITY


def test_best_fit_fills_rows_that_first_fit_would_not() -> None:
    # 6 + 4, 5 + 5 and 7 + 3 fill three rows of ten; in order they would take four.
    assert pack([4, 5, 3, 6, 7, 5], 10) == [[0, 3], [1, 5], [2, 4]]


@given(lengths, st.integers(0, 2**32 - 1))
def test_a_plan_holds_each_sample_of_the_order_once(sizes: list[int], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(sizes)).astype(np.int64)
    if len(order) == 0:
        return
    plan = packed(order, np.array(sizes, np.int64)[order], CAPACITY)
    rows = [plan.row(index) for index in range(len(plan))]
    assert sorted(s for row in rows for s in row) == list(range(len(sizes)))
    assert all(sum(sizes[s] for s in row) <= CAPACITY for row in rows)


def test_windows_are_packed_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.stream.WINDOW", 2)
    plan = packed(np.array([3, 1, 0, 2]), np.array([6, 5, 4, 4]), 10)
    assert [plan.row(index) for index in range(len(plan))] == [[3], [1], [0, 2]]


def test_concatenating_takes_every_sample_once() -> None:
    assert epoch_counts([5, 3], [1.0, 9.0], "concatenate") == [5, 3]


def test_weights_set_the_shares_by_the_largest_source() -> None:
    # The largest has 1000 samples and a quarter of the mixture: the others make up three quarters.
    assert epoch_counts([1000, 10, 50], [1.0, 1.0, 2.0], "weighted") == [1000, 1000, 2000]


def test_a_weight_that_rounds_to_nothing_still_gives_one_sample() -> None:
    assert epoch_counts([10, 5], [1.0, 0.001], "weighted") == [10, 1]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=4),
    st.integers(0, 5),
    st.booleans(),
)
def test_an_epoch_holds_as_many_of_each_source_as_asked(
    sources: list[tuple[int, int]], epoch: int, shuffle: bool
) -> None:
    sizes, counts = [s for s, _ in sources], [c for _, c in sources]
    order = epoch_order(sizes, counts, seed=1, epoch=epoch, shuffle=shuffle)
    bounds = np.cumsum(sizes)
    found = Counter(int(np.searchsorted(bounds, index, side="right")) for index in order)
    assert [found[source] for source in range(len(sizes))] == counts


@given(st.integers(1, 30), st.integers(1, 45), st.integers(1, 5))
def test_a_source_is_used_up_before_it_repeats(size: int, count: int, epochs: int) -> None:
    drawn = Counter(
        index
        for epoch in range(epochs)
        for index in epoch_order([size], [count], seed=3, epoch=epoch, shuffle=True).tolist()
    )
    times = [drawn[index] for index in range(size)]
    assert max(times) - min(times) <= 1


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_order([50], [50], seed=seed, epoch=epoch, shuffle=True).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_without_shuffling_sources_keep_their_order() -> None:
    order = epoch_order([2, 3], [2, 3], seed=0, epoch=1, shuffle=False)
    assert order.tolist() == [0, 1, 2, 3, 4]


def test_without_shuffling_a_weighted_mixture_is_even() -> None:
    order = epoch_order([4, 2], [4, 4], seed=0, epoch=0, shuffle=False)
    assert order.tolist() == [0, 4, 1, 5, 2, 4, 3, 5]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_source_without_samples_gives_none(shuffle: bool) -> None:
    sizes = [3, 0, 2]
    counts = epoch_counts(sizes, [1.0, 1.0, 1.0], "concatenate")
    order = epoch_order(sizes, counts, seed=0, epoch=1, shuffle=shuffle)
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]


def test_a_source_without_samples_can_have_no_share() -> None:
    with pytest.raises(DataError, match=r"source 2 of data\.train has no samples left"):
        epoch_counts([3, 0], [1.0, 1.0], "weighted")
