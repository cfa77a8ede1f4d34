"""Tables of tokens: made once, found again, made anew when anything changes."""

from pathlib import Path

import numpy as np
import pytest

from data_files import exchanges, jsonl
from tiny import CHATML, CHATML_UNMARKED, tiny_tokenizer
from tunesmith.data import tokenise
from tunesmith.data.settings import Source
from tunesmith.data.sources import locate
from tunesmith.data.table import TokenTable
from tunesmith.data.tokenise import TokenisingProgress, job_of, tokenised
from tunesmith.errors import DataError, SetupError


def table(path: Path, cache: Path, **changes: object) -> TokenTable:
    settings = {"supervise": "assistant", "on_bad_row": "stop"}
    settings |= {key: changes.pop(key) for key in settings.keys() & changes.keys()}
    template = changes.pop("template", CHATML)
    run = {key: changes.pop(key) for key in {"workers", "progress"} & changes.keys()}
    located = locate(Source(path=str(path), **changes))
    return tokenised(job_of(located, tiny_tokenizer(template), **settings), cache=cache, **run)


def same(one: TokenTable, two: TokenTable) -> bool:
    columns = ("length", "first", "prompt", "ordinal")
    return (
        np.array_equal(one.tokens, two.tokens)
        and np.array_equal(one.supervised, two.supervised)
        and all(np.array_equal(one.column(name), two.column(name)) for name in columns)
        and one.reading == two.reading
    )


def test_the_second_time_the_table_comes_from_the_cache(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", exchanges(5))
    first = table(path, tmp_path / "cache")
    made = (first.directory / "tokens.bin").stat().st_mtime_ns
    second = table(path, tmp_path / "cache")
    assert second.directory == first.directory
    assert (second.directory / "tokens.bin").stat().st_mtime_ns == made


def test_the_cache_goes_by_content_and_not_by_name(tmp_path: Path) -> None:
    one = table(jsonl(tmp_path / "a.jsonl", exchanges(5)), tmp_path / "cache")
    two = table(jsonl(tmp_path / "b.jsonl", exchanges(5)), tmp_path / "cache")
    assert one.directory == two.directory
    assert two.reading.name == str(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        {"template": CHATML_UNMARKED},
        {"supervise": "all"},
        {"on_bad_row": "skip"},
        {"system": "be kind"},
        {"limit": 3},
        {"columns": {"prompt": "completion", "completion": "prompt"}},
        {"prompt": "{prompt}", "completion": "{completion}"},
    ],
    ids=str,
)
def test_what_changes_the_tokens_changes_the_table(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", exchanges(5))
    plain = table(path, tmp_path / "cache")
    assert table(path, tmp_path / "cache", **change).directory != plain.directory


def test_a_changed_file_changes_the_table(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", exchanges(5))
    before = table(path, tmp_path / "cache")
    jsonl(path, exchanges(5, start=1))
    assert table(path, tmp_path / "cache").directory != before.directory


def test_a_file_that_is_read_otherwise_has_another_table(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.txt", [{"text": "hello"}])
    as_text = table(path, tmp_path / "cache")
    as_json = table(path.rename(tmp_path / "rows.jsonl"), tmp_path / "cache")
    decode = tiny_tokenizer().decode
    assert decode(as_text.tokens) == '{"text": "hello"}<|im_end|>'
    assert decode(as_json.tokens) == "hello<|im_end|>"


def test_a_changed_vocabulary_changes_the_table_and_a_padded_call_does_not(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    state = tokenise.tokenizer_state(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenise.tokenizer_state(tokenizer) == state
    tokenizer.add_tokens(["new"])
    assert tokenise.tokenizer_state(tokenizer) != state


def test_weights_do_not_change_the_table(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", exchanges(5))
    assert (
        table(path, tmp_path / "cache").directory
        == table(path, tmp_path / "cache", weight=3.0).directory
    )


def test_a_bad_row_leaves_nothing_behind(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*exchanges(5), {"prompt": "x"}])
    with pytest.raises(DataError, match=r"rows.jsonl, row 6: has no column 'completion'"):
        table(path, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []


def test_skipped_rows_are_counted_and_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [exchanges(1)[0], 3, {"prompt": "x"}, exchanges(2)[1]])
    found = table(path, tmp_path / "cache", on_bad_row="skip")
    assert found.reading.rows == 4
    assert found.reading.bad == 2
    assert ["row 2" in found.reading.messages[0], "row 3" in found.reading.messages[1]] == [
        True
    ] * 2
    assert found.column("ordinal").tolist() == [0, 3]


def test_nothing_but_bad_rows_is_an_empty_table(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    found = table(path, tmp_path / "cache", format="prompt_completion", on_bad_row="skip")
    assert len(found) == 0


@pytest.fixture
def few_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let further processes help with small files too."""
    monkeypatch.setattr(tokenise, "ROWS_ALONE", 2 * tokenise.BLOCK)


@pytest.mark.slow
@pytest.mark.usefixtures("few_alone")
def test_several_processes_make_the_table_of_one(tmp_path: Path) -> None:
    rows = exchanges(6 * tokenise.BLOCK + 17)
    rows[5], rows[-3] = {"prompt": "early"}, {"prompt": "late"}
    path = jsonl(tmp_path / "rows.jsonl", rows)
    seen: list[TokenisingProgress] = []
    alone = table(path, tmp_path / "alone", on_bad_row="skip", workers=1)
    together = table(
        path, tmp_path / "together", on_bad_row="skip", workers=2, progress=seen.append
    )
    assert same(alone, together)
    assert together.reading.bad == 2
    assert [p.rows for p in seen] == sorted(p.rows for p in seen)
    assert seen[-1] == TokenisingProgress(str(path), len(rows), True)


@pytest.mark.slow
@pytest.mark.usefixtures("few_alone")
def test_a_bad_row_in_another_process_stops_the_run(tmp_path: Path) -> None:
    rows = [*exchanges(3 * tokenise.BLOCK), {"prompt": "late"}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=rf"rows.jsonl, row {len(rows)}: has no column"):
        table(path, tmp_path / "cache", workers=2)


@pytest.mark.slow
@pytest.mark.usefixtures("few_alone")
def test_a_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "rows.jsonl", exchanges(3 * tokenise.BLOCK))
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(SetupError, match=r"ended with code 1 .*try data.workers=1"):
        table(path, tmp_path / "cache", workers=2)
