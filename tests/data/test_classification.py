"""Labelled rows: what becomes of them, and one sentence for each way they can be wrong."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from classifiers import tokenizer_for, write_rows
from tunesmith.data.classification import LabelledData, prepare_labelled
from tunesmith.data.classification_collate import LabelledCollator
from tunesmith.data.preview import preview
from tunesmith.data.settings import DataSettings, Source
from tunesmith.errors import DataError
from tunesmith.types import IGNORE

GOOD = [{"text": f"text {n} " + "x" * (n % 7), "label": "ab"[n % 2]} for n in range(20)]


def prepared(
    folder: Path,
    rows: list[dict[str, object]],
    kind: str = "single",
    *,
    test: list[dict[str, object]] | None = None,
    labels: list[str] | None = None,
    source: dict[str, object] | None = None,
    **settings: object,
) -> LabelledData:
    path = write_rows(folder / "train.jsonl", rows)
    if test is not None:
        settings["evaluation"] = [Source(path=str(write_rows(folder / "test.jsonl", test)))]
    data = DataSettings(train=[Source(path=str(path), **(source or {}))], **settings)
    return prepare_labelled(data, tokenizer_for("bert"), kind, labels=labels, seed=0)


def batch_of(data: LabelledData, count: int, padding: str = "right") -> dict[str, torch.Tensor]:
    return LabelledCollator(2, padding, positions=False)(data.train.peek(count))


def test_texts_keep_the_tokenizers_own_special_tokens(tmp_path: Path) -> None:
    data = prepared(tmp_path, GOOD, shuffle=False)
    row = data.train.peek(1)[0]
    tokenizer = tokenizer_for("bert")
    assert row.input_ids.tolist() == tokenizer("text 0 ")["input_ids"]
    assert (row.input_ids[0], row.input_ids[-1]) == (1, 2)
    assert data.classes == ("a", "b")
    assert data.counts == (10, 10)


def test_labels_are_sorted_as_numbers_where_they_are(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": n} for n in (10, 9, 1, 1)]
    assert prepared(tmp_path, rows).classes == ("1", "9", "10")


def test_the_word_nan_is_a_name_among_labels(tmp_path: Path) -> None:
    words = ["nan", "b", "z", "10", "inf", "a", "9", "m", "y", "o"]
    rows = [{"text": f"t{n}", "label": word} for n, word in enumerate(words)]
    found = prepared(tmp_path, rows).classes
    assert found == ("9", "10", "a", "b", "inf", "m", "nan", "o", "y", "z")


def test_given_labels_decide_the_order(tmp_path: Path) -> None:
    data = prepared(tmp_path, GOOD, labels=["c", "b", "a"], shuffle=False)
    assert data.classes == ("c", "b", "a")
    assert batch_of(data, 4)["labels"].tolist() == [2, 1, 2, 1]


def test_columns_and_templates_name_other_files(tmp_path: Path) -> None:
    rows = [{"sentence": "s", "stars": n % 3} for n in range(9)]
    named = prepared(tmp_path, rows, source={"columns": {"text": "sentence", "label": "stars"}})
    filled = prepared(tmp_path, rows, source={"prompt": "{sentence}", "completion": "{stars}"})
    assert named.classes == filled.classes == ("0", "1", "2")


def test_two_texts_are_told_apart_and_the_longer_is_cut(tmp_path: Path) -> None:
    rows = [
        {"text": "abcdefghijklmn", "text_pair": "xy", "label": "a"},
        {"text": "p", "text_pair": "q", "label": "b"},
    ]
    data = prepared(tmp_path, rows, shuffle=False, max_length=10)
    batch = batch_of(data, 2)
    assert batch["token_type_ids"].tolist() == [[0] * 7 + [1] * 3, [0, 0, 0, 1, 1] + [0] * 5]
    assert batch["input_ids"][0, -1] == 2
    assert data.train_report.truncated == 1


def test_several_labels_become_ones_and_zeros(tmp_path: Path) -> None:
    rows = [
        {"text": "t", "label": ["b", "a"]},
        {"text": "u", "label": []},
        {"text": "v", "label": '["c"]'},
    ]
    batch = batch_of(prepared(tmp_path, rows, "multi", shuffle=False), 3)
    assert batch["labels"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert batch["labels"].dtype == torch.float32


def test_numbers_may_be_text(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": "3.5"}, {"text": "u", "label": -1}]
    batch = batch_of(prepared(tmp_path, rows, "regression", shuffle=False), 2)
    assert batch["labels"].tolist() == [3.5, -1.0]


def test_of_numbers_no_token_is_said_to_be_supervised(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": 3.5}, {"text": "u", "label": -1}]
    told = prepared(tmp_path, rows, "regression").train_report.lines()
    assert not any("supervised" in line for line in told)


def test_the_first_token_of_a_word_carries_its_label(tmp_path: Path) -> None:
    rows = [{"tokens": ["ab", "c", "def"], "tags": ["X", "O", "X"]}]
    data = prepared(tmp_path, rows, "tokens", shuffle=False)
    row = data.train.peek(1)[0]
    tokenizer = tokenizer_for("bert")
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids.tolist())
    labelled = {t: int(n) for t, n in zip(tokens, row.target, strict=True) if n != IGNORE}
    assert labelled == {"a": 1, "c": 0, "d": 1}
    assert len(row.target) == len(row.input_ids)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_is_masked_though_the_text_holds_its_token(tmp_path: Path, padding: str) -> None:
    rows = [{"text": "<|im_end|>", "label": "a"}, {"text": "longer text", "label": "b"}]
    batch = batch_of(prepared(tmp_path, rows, shuffle=False), 2, padding)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 13]
    assert batch["attention_mask"][0, 0 if padding == "right" else -1] == 1
    assert batch["labels"].tolist() == [0, 1]


def test_held_out_rows_are_the_same_in_any_order(tmp_path: Path) -> None:
    def held(rows: list[dict[str, object]]) -> set[str]:
        data = prepared(tmp_path, rows, holdout=6)
        return {str(prompt.messages[0]["content"]) for prompt in data.examples if prompt}

    first = held(GOOD)
    assert len(first) == 6
    assert held(GOOD[::-1]) == first


def test_held_out_rows_are_the_same_for_runs_with_other_seeds(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", GOOD)
    settings = DataSettings(train=[Source(path=str(tmp_path / "rows.jsonl"))], holdout=6)
    first, second = (
        prepare_labelled(settings, tokenizer_for("bert"), "single", labels=None, seed=seed)
        for seed in (0, 1)
    )
    assert [p.messages for p in first.examples if p] == [p.messages for p in second.examples if p]


def test_the_preview_shows_the_label(tmp_path: Path) -> None:
    data = prepared(tmp_path, GOOD, shuffle=False)
    shown = preview(data, tokenizer_for("bert"), rows=2)
    assert [sample.label for row in shown.rows for sample in row] == ["a", "b"]
    assert "labels: a 10, b 10" in "\n".join(shown.train.lines())


BAD = {
    "one class": ([{"text": "t", "label": "a"}] * 3, "single", r"all 3 rows have the label 'a'"),
    "empty text": (
        [*GOOD, {"text": " ", "label": "a"}],
        "single",
        r"train.jsonl, row 21: 'text' is empty",
    ),
    "no column": (
        [{"sentence": "t", "label": "a"}],
        "single",
        r"row 1: has no column 'text'; its columns are sentence, label",
    ),
    "null label": ([{"text": "t", "label": None}], "single", r"row 1: 'label' is null"),
    "list label": ([{"text": "t", "label": ["a"]}], "single", r"row 1: 'label' is \[\"a\"\];"),
    "no list": (
        [{"text": "t", "label": ["a"]}, {"text": "t", "label": "a"}],
        "multi",
        r"row 2: 'label' is \"a\" and not a list of labels",
    ),
    "text target": (
        [{"text": "t", "label": 1}, {"text": "t", "label": "good"}],
        "regression",
        r"row 2: 'label' is \"good\", and objective.kind: regression needs a number",
    ),
    "nan target": (
        [{"text": "t", "label": 1}, {"text": "t", "label": float("nan")}],
        "regression",
        r"row 2: 'label' is NaN; a regression needs a finite number",
    ),
    "nan text target": (
        [{"text": "t", "label": "nan"}],
        "regression",
        r"row 1: 'label' is \"nan\"",
    ),
    "nan label": ([{"text": "t", "label": float("nan")}], "single", r"row 1: 'label' is nan"),
    "own label": (
        [{"text": "t", "label": f"sentence {n}"} for n in range(30)],
        "single",
        r"30 different labels in 30 rows \(such as 'sentence 0'\), which are no classes",
    ),
    "some pairs": (
        [{"text": "t", "text_pair": "u", "label": "a"}, {"text": "t", "label": "b"}],
        "single",
        r"row 2: has no 'text_pair'",
    ),
    "tags": (
        [{"tokens": ["a", "b"], "tags": ["O"]}],
        "tokens",
        r"row 1: has 2 tokens and 1 tags",
    ),
    "no tags": ([{"tokens": ["a"], "label": 1}], "tokens", r"row 1: has no column 'tags'"),
    "no words": ([{"tokens": "a b", "tags": ["O"]}], "tokens", r"'tokens' is \"a b\" and not a"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_with_file_row_and_column(tmp_path: Path, case: str) -> None:
    rows, kind, message = BAD[case]
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, rows, kind)


def test_more_classes_than_a_head_can_have_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.data.classification.MOST_CLASSES", 3)
    rows = [{"text": "t", "label": str(n % 4)} for n in range(40)]
    with pytest.raises(DataError, match=r"there are 4 different labels in 40 rows"):
        prepared(tmp_path, rows)


def test_a_label_that_training_never_saw_is_refused(tmp_path: Path) -> None:
    test = [{"text": "t", "label": "a"}, {"text": "u", "label": "new"}]
    with pytest.raises(DataError, match=r"test.jsonl, row 2: the label 'new' is none of the 2"):
        prepared(tmp_path, GOOD, test=test)


def test_a_label_that_the_settings_do_not_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: the label 'a' is none of the 2 that objective"):
        prepared(tmp_path, GOOD, labels=["b", "c"])


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    data = prepared(tmp_path, [*GOOD, {"text": "", "label": "a"}], on_bad_row="skip")
    assert data.train_report.bad == 1
    assert data.train_report.kept == 20


@pytest.mark.parametrize("setting", ["streaming", "packing"])
def test_what_makes_no_sense_for_labels_is_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(DataError, match=f"data.{setting}"):
        prepared(tmp_path, GOOD, **{setting: True})


def test_a_system_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="system makes conversations"):
        prepared(tmp_path, GOOD, source={"system": "You judge."})


def test_a_csv_of_labels_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "label"], ["good, really", "1"], ["bad", "0"]])
    data = DataSettings(train=[Source(path=str(path))], shuffle=False)
    found = prepare_labelled(data, tokenizer_for("gpt2"), "single", labels=None, seed=0)
    assert found.classes == ("0", "1")
    assert "token_type_ids" not in LabelledCollator(2, "right", positions=True)(found.train.peek(2))


def test_the_stream_goes_on_where_it_stood(tmp_path: Path) -> None:
    data = prepared(tmp_path, GOOD)
    data.train.take(7)
    state = json.loads(json.dumps(data.train.state_dict()))
    expected = [row.input_ids.tolist() for row in data.train.take(30)]
    again = prepared(tmp_path, GOOD)
    again.train.load_state_dict(state)
    assert [row.input_ids.tolist() for row in again.train.take(30)] == expected
    assert all(np.issubdtype(row.target.dtype, np.int64) for row in again.train.peek(3))
