"""The order of rows out of tables: epochs, resuming, shares of processes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_files import exchanges, jsonl, texts
from tiny import tiny_tokenizer
from tunesmith.data.prepare import prepare
from tunesmith.data.settings import DataSettings, Source
from tunesmith.data.stream import EpochStream
from tunesmith.errors import DataError

TOKENIZER = tiny_tokenizer()


def stream(tmp_path: Path, count: int = 20, *, seed: int = 7, **settings: object) -> EpochStream:
    path = jsonl(tmp_path / f"rows-{count}.jsonl", exchanges(count))
    chosen = DataSettings(train=[Source(path=str(path))], **settings)
    return prepare(chosen, TOKENIZER, seed=seed, cache=tmp_path / "cache").train


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_every_sample_once(tmp_path: Path, packing: bool) -> None:
    rows = stream(tmp_path, packing=packing, max_length=128)
    taken = rows.take(rows.rows_per_epoch)
    said = Counter("".join(texts(taken, TOKENIZER)).split("<|im_end|>"))
    for row in exchanges(20):
        assert said["\n<|im_start|>assistant\n" + row["completion"]] == 1
    assert rows.epoch == 1.0


def test_packed_rows_tell_their_segments(tmp_path: Path) -> None:
    rows = stream(tmp_path, packing=True, max_length=128).take(5)
    assert any(len(row.segments) > 1 for row in rows)
    for row in rows:
        assert sum(row.segments) == len(row.input_ids) == len(row.supervised) <= 128
        starts = np.cumsum((0, *row.segments[:-1]))
        assert (row.input_ids[starts] == 1).all()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("place", [0, 1, 7, 19, 20, 33, 41])
def test_resuming_gives_the_rows_of_an_uninterrupted_run(
    tmp_path: Path, place: int, packing: bool
) -> None:
    first = stream(tmp_path, packing=packing, max_length=128)
    first.take(place)
    state, expected = first.state_dict(), texts(first.take(30), TOKENIZER)
    again = stream(tmp_path, packing=packing, max_length=128)
    again.take(3)
    again.load_state_dict(state)
    assert texts(again.take(30), TOKENIZER) == expected
    assert again.epoch == first.epoch


def test_the_order_does_not_depend_on_how_many_rows_are_taken_at_once(tmp_path: Path) -> None:
    one, two = stream(tmp_path), stream(tmp_path)
    parts = [two.take(count) for count in (1, 4, 16, 3, 6)]
    assert texts(one.take(30), TOKENIZER) == texts([r for p in parts for r in p], TOKENIZER)


def test_processes_that_keep_their_share_see_what_one_process_sees(tmp_path: Path) -> None:
    alone = texts(stream(tmp_path).take(24), TOKENIZER)
    shares = []
    for rank in range(2):
        rows = stream(tmp_path)
        shares.append([text for _ in range(6) for text in texts(rows.take(4), TOKENIZER)[rank::2]])
    assert sorted(shares[0] + shares[1]) == sorted(alone)
    assert shares[0][:2] == alone[0:4:2]


def test_peeking_takes_nothing(tmp_path: Path) -> None:
    rows = stream(tmp_path)
    rows.take(18)
    peeked = texts(rows.peek(5), TOKENIZER)
    assert texts(rows.take(5), TOKENIZER) == peeked


def test_without_shuffling_rows_come_as_they_stand(tmp_path: Path) -> None:
    rows = texts(stream(tmp_path, shuffle=False).take(20), TOKENIZER)
    assert [row["prompt"] in text for row, text in zip(exchanges(20), rows, strict=True)] == [
        True
    ] * 20


def test_epochs_have_orders_of_their_own(tmp_path: Path) -> None:
    rows = stream(tmp_path)
    first, second = texts(rows.take(20), TOKENIZER), texts(rows.take(20), TOKENIZER)
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_state_over_other_data_is_refused(tmp_path: Path) -> None:
    state = stream(tmp_path).state_dict()
    with pytest.raises(DataError, match="made with 20 samples of training data, and there are 21"):
        stream(tmp_path, 21).load_state_dict(state)


def test_weighted_sources_have_the_shares_of_their_weights(tmp_path: Path) -> None:
    small = jsonl(tmp_path / "small.jsonl", exchanges(5, start=1000))
    large = jsonl(tmp_path / "large.jsonl", exchanges(40))
    settings = DataSettings(
        train=[Source(path=str(large), weight=2), Source(path=str(small), weight=1)],
        mixing="weighted",
    )
    rows = prepare(settings, TOKENIZER, seed=0, cache=tmp_path / "cache").train
    taken = texts(rows.take(rows.rows_per_epoch), TOKENIZER)
    of_small = Counter(text for text in taken if "ask 100" in text)
    assert len(taken) == 60
    assert sorted(of_small.values()) == [4, 4, 4, 4, 4]
