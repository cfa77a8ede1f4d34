"""From data settings to rows, prompts and reports."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from data_files import exchanges, jsonl, texts
from tiny import tiny_tokenizer
from tunesmith.data.corpus import hold_out
from tunesmith.data.prepare import PreparedData, prepare
from tunesmith.data.preview import Piece, preview
from tunesmith.data.settings import DataSettings, Source
from tunesmith.errors import DataError

TOKENIZER = tiny_tokenizer()


def prepared(
    folder: Path, rows: list[object], *, seed: int = 0, **settings: object
) -> PreparedData:
    path = jsonl(folder / "train.jsonl", rows)
    chosen = DataSettings(train=[Source(path=str(path))], **settings)
    return prepare(chosen, TOKENIZER, seed=seed, cache=folder / "cache")


def test_the_report_counts_by_hand(tmp_path: Path) -> None:
    # Frame: start user \n = 6, end \n = 2, start assistant \n = 11; then reply, end, \n.
    rows = [
        {"prompt": "ab", "completion": "cde"},  # 6 + 2 + 2 + 11 + 3 + 2 = 26 tokens, 4 supervised
        {"prompt": "ab", "completion": "c" * 20},  # 43 tokens, cut to 30: 9 supervised
        {"prompt": "a" * 30, "completion": "c"},  # no reply within 30
    ]
    report = prepared(tmp_path, rows, max_length=30, max_dropped=0.5).train_report
    assert (report.rows, report.bad, report.dropped) == (3, 0, 1)
    assert (report.kept, report.truncated) == (2, 1)
    assert (report.tokens, report.supervised_tokens) == (26 + 30, 4 + 9)
    assert sum(bar.rows for bar in report.lengths) == 2
    assert all(bar.start <= length < bar.stop for bar, length in _filled(report, [26, 43]))
    assert json.loads(json.dumps(report.to_json()))["sources"][0]["format"] == "prompt_completion"


def _filled(report: object, lengths: list[int]) -> list[tuple[object, int]]:
    bars = [bar for bar in report.lengths if bar.rows]
    return list(zip(bars, lengths, strict=True))


def test_rows_are_cut_at_the_end(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "c" * 20}]
    row = prepared(tmp_path, rows, max_length=30).train.take(1)[0]
    assert TOKENIZER.decode(row.input_ids.tolist()).endswith("assistant\n" + "c" * 9)
    assert len(row.input_ids) == 30


def test_too_many_dropped_rows_stop_and_say_what_would_keep_them(tmp_path: Path) -> None:
    # The reply begins at token 21 + len(prompt): 100 rows, prompts of 0 to 99 letters.
    rows = [{"prompt": "p" * n, "completion": "c"} for n in range(100)]
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, rows, max_length=60)
    message = str(caught.value)
    first = 6 + 2 + 11  # position of the reply after an empty prompt
    assert f"{100 - (60 - first)} of 100 rows would be lost" in message
    assert "more than data.max_dropped 0.2" in message
    assert f"data.max_length {first + 94 + 1} would keep 95 % of the samples" in message
    kept = prepared(tmp_path, rows, max_length=first + 95).train_report.kept
    assert kept == 95


def test_empty_replies_are_dropped_and_no_length_would_keep_them(tmp_path: Path) -> None:
    rows = [*exchanges(2), {"prompt": "a", "completion": ""}]
    assert prepared(tmp_path, rows, max_dropped=0.5).train_report.dropped == 1
    with pytest.raises(DataError, match=r"1 without any supervised token.*`tunesmith data show`"):
        prepared(tmp_path, rows)


def test_bad_rows_count_as_lost(tmp_path: Path) -> None:
    rows = [*exchanges(2), 1, 2]
    with pytest.raises(DataError, match=r"2 of 4 rows would be lost \(2 bad\)"):
        prepared(tmp_path, rows, on_bad_row="skip")


def test_a_source_with_nothing_left_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": ""}]
    with pytest.raises(DataError, match=r"train.jsonl: none of 1 rows is left to learn from"):
        prepared(tmp_path, rows, max_dropped=1)


def test_an_evaluation_source_gives_rows_prompts_and_references(tmp_path: Path) -> None:
    asked = [("one", "1"), ("two", "2"), ("one", "I"), ("one", "1")]
    rows = [{"prompt": p, "completion": c} for p, c in asked]
    path = jsonl(tmp_path / "test.jsonl", rows)
    found = prepared(tmp_path, exchanges(3), evaluation=[Source(path=str(path))])
    assert [p.messages[0]["content"] for p in found.prompts] == ["one", "two"]
    assert [p.reference for p in found.prompts] == [["1", "I", "1"], ["2"]]
    assert [e.reference for e in found.examples] == [["1"], ["2"], ["I"], ["1"]]
    assert len(found.evaluation) == 4
    for row, example in zip(found.evaluation, found.examples, strict=True):
        size = len(example.input_ids)
        assert row.input_ids[:size].tolist() == example.input_ids
        assert not row.supervised[:size].any()
    assert texts(found.evaluation[1:3], TOKENIZER)[1].endswith("I<|im_end|>\n")


def test_dropped_evaluation_rows_have_no_example(tmp_path: Path) -> None:
    rows = [exchanges(1)[0], {"prompt": "a", "completion": ""}, exchanges(3)[2]]
    path = jsonl(tmp_path / "test.jsonl", rows)
    found = prepared(tmp_path, exchanges(3), evaluation=[Source(path=str(path))], max_dropped=0.5)
    assert [e.reference[0] for e in found.examples] == [
        rows[0]["completion"],
        rows[2]["completion"],
    ]


def test_text_in_the_evaluation_has_no_prompt(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "test.jsonl", [{"text": "once"}])
    found = prepared(tmp_path, exchanges(3), evaluation=[Source(path=str(path))])
    assert found.examples == (None,)
    assert found.prompts == []


def test_prompts_that_training_asks_too_are_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "test.jsonl", exchanges(4, start=2))
    found = prepared(tmp_path, exchanges(3), evaluation=[Source(path=str(path))])
    assert found.evaluation_report.also_in_training == 1
    assert any("ask what training asks" in line for line in found.describe())


def test_no_evaluation_is_empty(tmp_path: Path) -> None:
    found = prepared(tmp_path, exchanges(3))
    assert (list(found.evaluation), found.examples, found.prompts) == ([], (), [])
    assert found.evaluation_report is None
    assert found.describe() == [f"train: {line}" for line in found.train_report.lines()]


@pytest.mark.parametrize(("holdout", "rows"), [(6, 6), (0.25, 10)])
def test_a_holdout_is_disjoint_and_fixed(tmp_path: Path, holdout: float, rows: int) -> None:
    found = prepared(tmp_path, exchanges(40), holdout=holdout)
    again = prepared(tmp_path, exchanges(40)[::-1], holdout=holdout)
    reseeded = prepared(tmp_path, exchanges(40), holdout=holdout, seed=1)
    other = prepared(tmp_path, exchanges(40), holdout=holdout, holdout_seed=1)
    held, same, also, different = (
        {p.messages[0]["content"] for p in data.prompts} for data in (found, again, reseeded, other)
    )
    assert len(held) == len(found.evaluation) == rows
    assert held == same == also != different
    trained = "".join(texts(found.train.take(found.train.rows_per_epoch), TOKENIZER))
    assert all(f"user\n{prompt}<|im_end|>" not in trained for prompt in held)
    assert found.train_report.kept == 40 - rows


def test_rows_with_one_prompt_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"ask {n // 4}", "completion": f"say {n}"} for n in range(40)]
    found = prepared(tmp_path, rows, holdout=9)
    assert [len(p.reference) for p in found.prompts] == [4, 4]
    assert found.evaluation_report.also_in_training == 0


def test_a_holdout_of_everything_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.holdout 3 takes all 3 samples"):
        hold_out(np.arange(3, dtype=np.uint64), holdout=3, seed=0)


def test_a_holdout_smaller_than_every_group_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.holdout 1 is 1 samples, fewer than the smallest"):
        hold_out(np.zeros(4, np.uint64), holdout=1, seed=0)


def test_settings_without_effect_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [jsonl(tmp_path / f"{n}.jsonl", exchanges(3, start=n * 10)) for n in range(2)]
    settings = DataSettings(
        train=[Source(path=str(paths[0]), weight=2), Source(path=str(paths[0]))],
        evaluation=[Source(path=str(paths[1]))],
        holdout=1,
    )
    with caplog.at_level(logging.WARNING):
        prepare(settings, TOKENIZER, seed=0, cache=tmp_path / "cache")
    assert "data.holdout has no effect" in caplog.text
    assert "weights have no effect" in caplog.text


def test_streams_are_evaluated_on_sources_of_their_own(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "test.jsonl", exchanges(4, start=50))
    found = prepared(tmp_path, exchanges(9), streaming=True, evaluation=[Source(path=str(path))])
    assert len(found.evaluation) == 4
    assert found.train_report.kept == 0
    found.train.take(2)
    assert found.train_report.kept == 9


def test_a_preview_shows_what_is_supervised_in_any_script(tmp_path: Path) -> None:
    rows = [{"prompt": "你好", "completion": "早上好 🙂"}]
    found = prepared(tmp_path, rows)
    shown = preview(found, TOKENIZER, rows=1)
    (sample,) = shown.rows[0]
    assert sample.pieces == (
        Piece("<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n", False),
        Piece("早上好 🙂<|im_end|>", True),
        Piece("\n", False),
    )
    assert sample.supervised_tokens == len("早上好 🙂".encode()) + 1
    assert sample.tokens == len(found.train.take(1)[0].input_ids)
    assert shown.truncated_share == 0.0
    assert shown.train.sources[0].format == "prompt_completion"


def test_a_preview_takes_packed_rows_apart(tmp_path: Path) -> None:
    found = prepared(tmp_path, exchanges(9), packing=True)
    (row,) = preview(found, TOKENIZER, rows=1).rows
    assert len(row) == 9
    assert found.train.epoch == 0.0
