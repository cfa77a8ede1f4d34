"""Rows read while training: the same rows after resuming, whatever is in flight."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from data_files import exchanges, jsonl, texts
from tiny import tiny_tokenizer
from tunesmith.data.prepare import prepare
from tunesmith.data.settings import DataSettings, Source
from tunesmith.data.streaming import StreamingRows
from tunesmith.errors import DataError

TOKENIZER = tiny_tokenizer()


def stream(*sources: Source, held_out: set[int] | None = None, **settings: object) -> StreamingRows:
    chosen = DataSettings(
        train=list(sources), streaming=True, **{"shuffle_buffer": 8, "max_length": 128} | settings
    )
    return StreamingRows(chosen, TOKENIZER, seed=5, held_out=held_out)


def source(path: Path, **settings: object) -> Source:
    return Source(path=str(path), **settings)


def two_sources(folder: Path) -> list[Source]:
    """A folder of two files, and a smaller source with another weight."""
    (folder / "parts").mkdir(exist_ok=True)
    jsonl(folder / "parts" / "a.jsonl", exchanges(13))
    jsonl(folder / "parts" / "b.jsonl", exchanges(9, start=13))
    small = jsonl(folder / "small.jsonl", exchanges(4, start=500))
    return [source(folder / "parts", weight=3.0), source(small)]


def said(rows: list[object]) -> Counter[str]:
    """Count the prompts of rows."""
    text = "".join(texts(rows, TOKENIZER))
    turns = text.split("<|im_start|>user\n")[1:]
    return Counter(turn.split("<|im_end|>")[0] for turn in turns)


def test_a_pass_holds_every_row_once(tmp_path: Path) -> None:
    rows = stream(*two_sources(tmp_path))
    prompts = {row["prompt"]: 1 for row in exchanges(22) + exchanges(4, start=500)}
    assert said(rows.take(26)) == prompts
    assert said(rows.take(26)) == prompts
    assert rows.epoch == 1.0
    assert rows.rows_per_epoch is None


def test_rows_are_shuffled_and_passes_differ(tmp_path: Path) -> None:
    rows = stream(source(jsonl(tmp_path / "rows.jsonl", exchanges(30))))
    first, second = list(said(rows.take(30))), list(said(rows.take(30)))
    in_order = [row["prompt"] for row in exchanges(30)]
    assert first != in_order
    assert first != second


def test_without_shuffling_rows_come_as_they_stand(tmp_path: Path) -> None:
    rows = stream(source(jsonl(tmp_path / "rows.jsonl", exchanges(30))), shuffle=False)
    assert list(said(rows.take(30))) == [row["prompt"] for row in exchanges(30)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("mixing", ["concatenate", "weighted"])
@pytest.mark.parametrize("seed", range(4))
def test_resuming_gives_the_rows_of_an_uninterrupted_run(
    tmp_path: Path, mixing: str, packing: bool, seed: int
) -> None:
    settings = {"mixing": mixing, "packing": packing, "shuffle_buffer": 1 + 5 * seed}
    place = random.Random(seed).randrange(90)
    first = stream(*two_sources(tmp_path), **settings)
    first.take(place)
    state = json.loads(json.dumps(first.state_dict()))
    expected = texts(first.take(70), TOKENIZER)
    again = stream(*two_sources(tmp_path), **settings)
    again.load_state_dict(state)
    assert texts(again.take(70), TOKENIZER) == expected
    assert again.state_dict() == first.state_dict()
    assert again.report() == first.report()


def parquet_file(folder: Path) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(exchanges(40)), path, row_group_size=7)
    return path


def gzipped_file(folder: Path) -> Path:
    plain = jsonl(folder / "plain.jsonl", exchanges(40)).read_bytes()
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(plain))
    return path


def csv_file(folder: Path) -> Path:
    path = folder / "rows.csv"
    lines = [f'"{row["prompt"]}\n",{row["completion"]}' for row in exchanges(40)]
    path.write_text("prompt,completion\n" + "\n".join(lines), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("write", [parquet_file, gzipped_file, csv_file])
def test_every_kind_of_file_resumes(tmp_path: Path, write: object) -> None:
    path = write(tmp_path)
    for place in (1, 23, 40, 57):
        first = stream(source(path))
        first.take(place)
        state, expected = first.state_dict(), texts(first.take(30), TOKENIZER)
        again = stream(source(path))
        again.load_state_dict(state)
        assert texts(again.take(30), TOKENIZER) == expected


def test_resuming_knows_the_first_row_behind_those_that_are_skipped(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", exchanges(20))
    first, again = (stream(source(path, skip=3), shuffle_buffer=17) for _ in range(2))
    first.take(1)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert texts(again.take(30), TOKENIZER) == texts(first.take(30), TOKENIZER)


def test_peeking_takes_nothing(tmp_path: Path) -> None:
    rows = stream(*two_sources(tmp_path))
    rows.take(9)
    peeked = texts(rows.peek(30), TOKENIZER)
    assert texts(rows.take(30), TOKENIZER) == peeked


def test_weights_are_kept_at_every_point(tmp_path: Path) -> None:
    rows = stream(*two_sources(tmp_path), mixing="weighted", shuffle=False)
    for taken in range(4, 80, 4):
        of_small = sum(n for prompt, n in said(rows.take(4)).items() if "ask 50" in prompt)
        assert of_small == 1, taken
    assert rows.epoch == 2.0


def test_packed_rows_hold_every_sample_and_do_not_overflow(tmp_path: Path) -> None:
    rows = stream(source(jsonl(tmp_path / "rows.jsonl", exchanges(1024))), packing=True)
    taken = []
    while sum(len(row.segments) for row in taken) < 1024:
        taken += rows.take(1)
    assert all(len(row.input_ids) <= 128 for row in taken)
    assert said(taken) == {row["prompt"]: 1 for row in exchanges(1024)}
    assert len(taken) < 700


def test_a_bad_row_stops_with_its_place(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*exchanges(20), {"prompt": "x"}])
    rows = stream(source(path))
    with pytest.raises(DataError, match=r"rows.jsonl, row 21: .*`data.on_bad_row: skip`"):
        rows.take(30)


def test_bad_rows_are_skipped_and_counted_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*exchanges(20), {"prompt": "x"}])
    rows = stream(source(path), on_bad_row="skip")
    rows.take(60)
    assert rows.report().bad == 1
    assert rows.report().rows == 21
    assert "row 21" in rows.report().sources[0].messages[0]


def test_rows_cut_to_nothing_are_dropped_and_too_many_stop_the_run(tmp_path: Path) -> None:
    long = [{"prompt": "?" * 200, "completion": "x"}] * 5
    path = jsonl(tmp_path / "rows.jsonl", [*exchanges(20), *long])
    rows = stream(source(path))
    rows.take(40)
    assert rows.report().dropped == 5
    strict = stream(source(path), max_dropped=0.1)
    with pytest.raises(DataError, match=r"5 of 25 rows would be lost .* would keep 95 %"):
        strict.take(40)


def test_the_stop_comes_before_the_end_of_a_long_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.data.streaming.CHECK_EVERY", 10)
    long = [{"prompt": "?" * 200, "completion": "x"}] * 10
    path = jsonl(tmp_path / "rows.jsonl", [*exchanges(5), *long, *exchanges(500)])
    with pytest.raises(DataError, match="5 of 10 rows would be lost"):
        stream(source(path), shuffle=False).take(6)


def test_a_source_with_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match="no row is left to learn from"):
        stream(source(path), max_dropped=1).take(1)


def test_a_state_of_other_sources_is_refused(tmp_path: Path) -> None:
    state = stream(*two_sources(tmp_path)).state_dict()
    with pytest.raises(DataError, match=r"with 2 sources in data.train, and there are 1 now"):
        stream(two_sources(tmp_path)[0]).load_state_dict(state)


def test_a_state_over_a_shorter_file_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", exchanges(30))
    rows = stream(source(path))
    rows.take(15)
    state = rows.state_dict()
    jsonl(path, exchanges(6))
    with pytest.raises(DataError, match="a row that the checkpoint holds is not there any more"):
        stream(source(path)).load_state_dict(state)


def test_the_size_of_a_state_does_not_depend_on_the_rows(tmp_path: Path) -> None:
    short = jsonl(tmp_path / "short.jsonl", [{"text": "x"}] * 50)
    long = jsonl(tmp_path / "long.jsonl", [{"text": "x" * 4000}] * 50)
    sizes = []
    for path in (short, long):
        rows = stream(source(path), max_length=4096)
        rows.take(20)
        sizes.append(len(json.dumps(rows.state_dict())))
    assert sizes[1] < 1.1 * sizes[0]


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    rows = [*exchanges(30), {"prompt": exchanges(1)[0]["prompt"], "completion": "once more"}]
    settings = DataSettings(
        train=[source(jsonl(tmp_path / "rows.jsonl", rows))], streaming=True, holdout=4
    )
    prepared = prepare(settings, TOKENIZER, seed=0, cache=tmp_path / "cache")
    held = [prompt.messages[0]["content"] for prompt in prepared.prompts]
    assert held == [row["prompt"] for row in rows[:4]]
    assert len(prepared.evaluation) == len(prepared.examples) == 4
    trained = said(prepared.train.take(52))
    assert set(trained) == {row["prompt"] for row in rows[4:30]}


def test_held_out_rows_come_from_every_source(tmp_path: Path) -> None:
    settings = DataSettings(train=two_sources(tmp_path), streaming=True, holdout=3)
    prepared = prepare(settings, TOKENIZER, seed=0, cache=tmp_path / "cache")
    held = [prompt.messages[0]["content"].strip("?") for prompt in prepared.prompts]
    assert held == ["ask 0", "ask 1", "ask 500"]


def test_holding_out_a_whole_source_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", exchanges(3))
    settings = DataSettings(train=[source(path)], streaming=True, holdout=4)
    with pytest.raises(DataError, match=r"data.holdout 4 takes all samples of"):
        prepare(settings, TOKENIZER, seed=0, cache=tmp_path / "cache")
