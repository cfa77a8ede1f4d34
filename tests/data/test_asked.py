"""Prompts of runs that learn from the model's own replies: what is read, and what is left out."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_tokenizer
from tunesmith.data.asked import AskedData, prepare_asked
from tunesmith.data.settings import DataSettings, Source
from tunesmith.errors import DataError


def asked(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> AskedData:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = DataSettings(train=[Source(path=str(path))], shuffle=False, **settings)
    return prepare_asked(data, tiny_tokenizer(), seed=0, reply_length=16)


def test_a_prompt_comes_with_the_columns_of_its_row(tmp_path: Path) -> None:
    (row,) = asked(tmp_path, [{"prompt": "1 + 1 =", "answer": 2}]).train.take(1)
    assert row.text == "1 + 1 ="
    assert row.columns["answer"] == 2
    assert "1 + 1 =" in tiny_tokenizer().decode(row.input_ids)


def test_prompts_that_leave_no_room_for_a_reply_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}"} for n in range(9)]
    long = {"prompt": "x" * 100}
    report = asked(tmp_path, [*rows, long], max_length=64).train_report
    assert report.kept == 9
    assert report.sources[0].dropped == 1
    assert "1 too long for a reply and dropped" in report.lines()[0]
    with pytest.raises(DataError, match=r"1 of 3 prompts have more than 48 tokens"):
        asked(tmp_path, [*rows[:2], long], max_length=64)


def test_a_prompt_may_be_cut_instead(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "abcdef" * 20}))
    data = DataSettings(train=[Source(path=str(path))], max_length=64)
    tokenizer = tiny_tokenizer()
    found = prepare_asked(data, tokenizer, seed=0, reply_length=16, prompt_tokens=30)
    (row,) = found.train.take(1)
    assert len(row.input_ids) == 30


def two_sources(folder: Path, **settings: Any) -> AskedData:
    """Twelve prompts that begin with a, and four that begin with b and weigh three times a's."""
    sources = []
    for letter, count, weight in (("a", 12, 1.0), ("b", 4, 3.0)):
        path = folder / f"{letter}.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": f"{letter}{n}"}) for n in range(count)))
        sources.append(Source(path=str(path), weight=weight))
    data = DataSettings(train=sources, **settings)
    return prepare_asked(data, tiny_tokenizer(), seed=0, reply_length=16)


def test_sources_are_mixed_by_their_weights(tmp_path: Path) -> None:
    stream = two_sources(tmp_path, mixing="weighted").train
    # The larger source once, and of the other three times as many: each of the four 9 times.
    assert stream.rows_per_epoch == 12 + 36
    taken = Counter(row.text for row in stream.take(48))
    assert stream.epoch == 1.0
    assert taken == {f"a{n}": 1 for n in range(12)} | {f"b{n}": 9 for n in range(4)}
    assert two_sources(tmp_path).train.rows_per_epoch == 16


def test_a_place_among_weighted_sources_is_found_again(tmp_path: Path) -> None:
    one, other = (two_sources(tmp_path, mixing="weighted", holdout=3).train for _ in range(2))
    one.take(one.rows_per_epoch + 5)
    other.load_state_dict(one.state_dict())
    assert [row.text for row in other.take(20)] == [row.text for row in one.take(20)]
    with pytest.raises(DataError, match="prompts an epoch, and there are 13 now"):
        two_sources(tmp_path, holdout=3).train.load_state_dict(one.state_dict())


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


FIRST, SECOND = turn("user", "one?"), turn("user", "two?")
SYSTEM, SAID, REPLY = turn("system", "Be kind"), turn("assistant", "1"), turn("assistant", "2")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "one?", "system": "Be kind"}, [SYSTEM, FIRST]),
        ({"prompt": [FIRST], "system": "Be kind"}, [SYSTEM, FIRST]),
        ({"prompt": [FIRST, SAID, SECOND]}, [FIRST, SAID, SECOND]),
        ({"prompt": [SYSTEM, FIRST, SAID, SECOND]}, [SYSTEM, FIRST, SAID, SECOND]),
        ({"messages": [FIRST, SAID, SECOND]}, [FIRST, SAID, SECOND]),
        ({"messages": [FIRST, SAID, SECOND, REPLY]}, [FIRST, SAID, SECOND]),
        ({"prompt": [FIRST], "completion": [REPLY]}, [FIRST]),
        ({"instruction": "one?", "output": "1", "system": "Be kind"}, [SYSTEM, FIRST]),
        ({"instruction": "one?", "chosen": "1", "rejected": "2"}, [FIRST]),
        ({"chosen": [FIRST, SAID], "rejected": [FIRST, REPLY]}, [FIRST]),
    ],
    ids=str,
)
def test_all_that_comes_before_the_reply_is_asked(
    tmp_path: Path, row: dict[str, Any], expected: list[dict[str, str]]
) -> None:
    """A row that ends with what is asked is asked whole, its own system turn before it."""
    (found,) = asked(tmp_path, [row]).train.take(1)
    assert found.messages == expected
    template = tiny_tokenizer()
    prompt = template.apply_chat_template(expected, add_generation_prompt=True, tokenize=False)
    assert template.decode(found.input_ids) == prompt


def test_tools_that_the_template_leaves_out_are_told(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    with pytest.raises(DataError, match="leaves out the row's tools"):
        asked(tmp_path, [{"prompt": "one?", "tools": [tool]}])


@pytest.mark.parametrize("row", [{"answer": 2}, {"messages": []}], ids=str)
def test_a_row_that_asks_nothing_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl.*row 2"):
        asked(tmp_path, [{"prompt": "a"}, row])
