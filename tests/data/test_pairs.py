"""Rows of judged replies: every layout, what is dropped, what is learned from."""

import json
from pathlib import Path
from typing import Any

import pytest

from pairs import write_rows
from tiny import CHATML, CHATML_UNMARKED, tiny_tokenizer
from tunesmith.data.pairs import PairRow, prepare_pairs
from tunesmith.data.pairs_rows import dialogue
from tunesmith.data.rows import samples_of
from tunesmith.data.settings import DataSettings, Source
from tunesmith.errors import DataError

TOKENIZER = tiny_tokenizer()
ASK = [{"role": "user", "content": "ask"}]


def rows_of(folder: Path, rows: list[dict[str, Any]], judgement: str = "pairs", **more: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    settings = DataSettings(train=[Source(path=str(path))], shuffle=False, **more)
    return prepare_pairs(settings, TOKENIZER, judgement, seed=0)


def replies(row: PairRow) -> list[str]:
    """What each segment is supervised on."""
    return [TOKENIZER.decode(s.input_ids[s.supervised]) for s in samples_of(row)]


LAYOUTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
    "instruction": {"instruction": "ask", "chosen": "good", "rejected": "bad"},
    "messages": {
        "prompt": ASK,
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    },
    "prompt inside": {
        "chosen": [*ASK, {"role": "assistant", "content": "good"}],
        "rejected": [*ASK, {"role": "assistant", "content": "bad"}],
    },
    "sharegpt ranking": {
        "conversations": [{"from": "human", "value": "ask"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "whole dialogues": {
        "chosen": "\n\nHuman: ask\n\nAssistant: good",
        "rejected": "\n\nHuman: ask\n\nAssistant: bad",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_same_row(tmp_path: Path, layout: str) -> None:
    (row,) = rows_of(tmp_path, [LAYOUTS[layout]]).train.take(1)
    assert replies(row) == ["good<|im_end|>", "bad<|im_end|>"]
    assert (row.winners, row.losers, row.margins) == ((0,), (1,), (0.0,))
    text = TOKENIZER.decode(samples_of(row)[0].input_ids)
    assert text == "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\ngood<|im_end|>"


def test_only_the_last_reply_is_learned_from(tmp_path: Path) -> None:
    asked = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": asked + " yes", "rejected": asked + " no"}
    (row,) = rows_of(tmp_path, [row]).train.take(1)
    assert replies(row) == ["yes<|im_end|>", "no<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED], ids=["marked", "unmarked"])
def test_no_end_is_learned_of_an_unfinished_reply(tmp_path: Path, template: str) -> None:
    full = {"role": "assistant", "content": "and so o", "unfinished": True}
    rows = [
        {"prompt": "ask", "chosen": "good", "rejected": full},
        {"prompt": ASK, "chosen": [full], "rejected": [{**full, "unfinished": False}]},
    ]
    tokenizer = tiny_tokenizer(template)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    settings = DataSettings(train=[Source(path=str(path))], shuffle=False)
    data = prepare_pairs(settings, tokenizer, "pairs", seed=0)
    first, second = data.train.take(2)
    assert replies(first) == ["good<|im_end|>", "and so o"]
    assert replies(second) == ["and so o", "and so o<|im_end|>"]
    full_row, ended = samples_of(second)
    assert ended.input_ids[:-1].tolist() == full_row.input_ids.tolist()
    assert data.train_report.unfinished == 2
    assert data.train_report.truncated == 0


def test_a_ranking_gives_all_pairs_of_replies_that_differ_in_score(tmp_path: Path) -> None:
    row = {"prompt": "ask", "replies": ["a", "b", "c"], "scores": [1, 3, 1]}
    (row,) = rows_of(tmp_path, [row]).train.take(1)
    assert list(zip(row.winners, row.losers, row.margins, strict=True)) == [
        (1, 0, 2.0),
        (1, 2, 2.0),
    ]


def test_labelled_replies_get_the_reply_of_another_prompt_beside_them(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "completion": "a", "label": True},
        {"messages": [*ASK, {"role": "assistant", "content": "b"}], "label": False},
        {"prompt": "two", "chosen": "c", "rejected": "d"},
    ]
    found = rows_of(tmp_path, rows, "labels").train.take(4)
    assert [row.good for row in found] == [True, False, True, False]
    assert [[r[0] for r in replies(row)] for row in found] == [
        ["a", "d"],
        ["b", "a"],
        ["c", "b"],
        ["d", "b"],
    ]


def test_equal_replies_ties_and_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    good = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(20)]
    tie = {"score_chosen": 5, "score_rejected": 5}
    bad = [
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "x", "chosen": "c", "rejected": "d", "metadata": tie},
        {"prompt": "x" * 200, "chosen": "c", "rejected": "d"},
    ]
    report = rows_of(tmp_path, good + bad, max_length=64).train_report
    assert report.kept == 20
    assert dict(report.sources[0].reasons) == {
        "equal replies": 1,
        "ties": 1,
        "prompt longer than data.max_length": 1,
    }
    with pytest.raises(DataError, match=r"3 of 7 rows.*1 ties.*rows\.jsonl"):
        rows_of(tmp_path, good[:4] + bad, max_length=64)


@pytest.mark.parametrize("scores", [{"score_chosen": 1, "score_rejected": 4}, {"margin": -3}])
def test_scores_that_contradict_the_choice_make_a_bad_row(
    tmp_path: Path, scores: dict[str, float]
) -> None:
    """Neither learned from the wrong way round nor without a word."""
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(5)]
    with pytest.raises(DataError, match=r"row 6: .*disagree about which reply is the better"):
        rows_of(tmp_path, [*rows, rows[0] | scores])
    skipped = rows_of(tmp_path, [*rows, rows[0] | scores], on_bad_row="skip").train_report
    assert (skipped.kept, skipped.sources[0].bad) == (5, 1)


def test_too_many_equal_replies_stop_the_run(tmp_path: Path) -> None:
    same = {"prompt": "x", "chosen": "same", "rejected": "same"}
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(8)]
    assert rows_of(tmp_path, [*rows, same, same]).train_report.kept == 8  # a fifth is allowed
    with pytest.raises(DataError, match=r"3 of 11 rows would be lost \(3 equal replies\)"):
        rows_of(tmp_path, [*rows, same, same, same])


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_empty_replies_are_dropped_and_counted(tmp_path: Path, side: str) -> None:
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(5)]
    report = rows_of(tmp_path, [*rows, rows[0] | {side: ""}]).train_report
    assert report.kept == 5
    assert dict(report.sources[0].reasons) == {"empty reply": 1}


def test_steps_end_at_the_last_token_of_each_step(tmp_path: Path) -> None:
    row = {"prompt": "ask", "completions": ["2+2=4", "so 5"], "labels": [True, False]}
    (row,) = rows_of(tmp_path, [row], "steps").train.take(1)
    ends = [TOKENIZER.decode(row.input_ids[p - 1 : p + 1]) for p, _ in row.steps]
    assert ends == ["=4", " 5"]
    assert [right for _, right in row.steps] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "a", "rejected": "b"}, "no prompt beside"),
        ({"prompt": "a", "chosen": "b"}, "'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": ASK, "rejected": "b"}, "does not end with an assistant turn"),
        ({"prompt": "a", "replies": ["b", "c"], "scores": [1]}, "2 replies and 1 scores"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        rows_of(tmp_path, [row])


def test_a_text_that_only_mentions_a_human_is_no_dialogue() -> None:
    assert dialogue("Human: hello") == []
    assert [turn["role"] for turn in dialogue("\n\nHuman: a\n\nAssistant: b")] == [
        "user",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("name", "judgement"),
    [
        ("hh_rlhf_harmless/test.jsonl.gz", "pairs"),
        ("llms_from_scratch/instruction-data-with-preference.json", "pairs"),
        ("llamafactory_demos/dpo_en_demo.json", "pairs"),
        ("llamafactory_demos/kto_en_demo.json", "labels"),
        ("ultrafeedback_1k/eval_clean.jsonl", "pairs"),
    ],
)
def test_published_sets_are_read_as_they_are(shared_data: Path, name: str, judgement: str) -> None:
    source = Source(path=str(shared_data / name), limit=40)
    data = prepare_pairs(
        DataSettings(train=[source], max_length=16_000), TOKENIZER, judgement, seed=0
    )
    assert data.train_report.kept >= 30
    row = data.train.take(1)[0]
    assert all(reply.endswith("<|im_end|>") for reply in replies(row))
