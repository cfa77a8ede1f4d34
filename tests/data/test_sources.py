"""Finding what a source means, and what is not there."""

from pathlib import Path

import pytest

from data_files import exchanges, jsonl, values
from tunesmith.data.settings import DataSettings, Source
from tunesmith.data.sources import content_hash, locate, split_of
from tunesmith.errors import DataError


def names(path: Path | str, **settings: object) -> list[str]:
    return [file.name for file in locate(Source(path=str(path), **settings)).files]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder '.*/nowhere.jsonl'"):
        locate(Source(path=str(tmp_path / "nowhere.jsonl")))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        locate(Source(path=str(tmp_path / "nowhere")))


def test_an_unknown_kind_of_file_names_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    path.write_text("x")
    with pytest.raises(DataError, match=r"unknown kind of file; expected \.json, \.jsonl"):
        locate(Source(path=str(path)))


def test_a_folder_gives_its_files_in_order_and_leaves_others_out(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "README.txt", "dataset_info.json", "x.py"):
        jsonl(tmp_path / name, exchanges(1))
    (tmp_path / "deep").mkdir()
    jsonl(tmp_path / "deep" / "c.jsonl", exchanges(1))
    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder holds no"):
        locate(Source(path=str(tmp_path)))


def test_a_folder_with_splits_never_gives_the_test_with_the_training_rows(tmp_path: Path) -> None:
    for name in ("trainset.csv", "testset_w_refs.csv", "books.test.csv"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    assert names(tmp_path) == ["trainset.csv"]
    assert names(tmp_path, split="test") == ["books.test.csv", "testset_w_refs.csv"]
    with pytest.raises(DataError, match=r"no file of split 'dev'; the folder holds books\.test"):
        names(tmp_path, split="dev")


def test_a_split_may_have_any_name(tmp_path: Path) -> None:
    for name in ("easy.jsonl", "hard.jsonl"):
        jsonl(tmp_path / name, exchanges(1))
    assert names(tmp_path, split="hard") == ["hard.jsonl"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("Validation.jsonl", "val"),
        ("eval_clean.jsonl", "eval"),
        ("constraint.jsonl", None),
        ("devices.csv", None),
    ],
)
def test_splits_are_read_off_whole_words(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_a_glob_gives_what_matches(tmp_path: Path) -> None:
    for name in ("a1.jsonl", "a2.jsonl", "b1.jsonl"):
        jsonl(tmp_path / name, exchanges(1))
    assert names(tmp_path / "a*.jsonl") == ["a1.jsonl", "a2.jsonl"]
    with pytest.raises(DataError, match="no file matches"):
        names(tmp_path / "c*.jsonl")


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    rows = exchanges(9)
    assert values(jsonl(tmp_path / "rows.jsonl", rows), limit=4) == rows[:4]


def test_a_hub_name_while_offline_is_one_clear_error() -> None:
    with pytest.raises(DataError) as caught:
        values("nobody/nothing")
    message = str(caught.value)
    assert (
        "'nobody/nothing' is no file, folder or zoo name, and the Hub cannot be reached" in message
    )
    assert "\n" not in message


def test_a_name_near_the_zoo_s_gets_a_hint() -> None:
    with pytest.raises(DataError, match="sentiment-4-domains/movie"):
        locate(Source(path="sentiment-4-domains/a/movies"))


@pytest.mark.zoo
def test_a_zoo_name_gives_its_split() -> None:
    assert names("sentiment-4-domains/movie-polarity") == ["train.jsonl"]
    assert names("sentiment-4-domains/movie-polarity", split="test") == ["test.jsonl"]
    assert len(values("sentiment-4-domains/movie-polarity", split="test")) == 400


def test_the_hash_follows_contents_and_not_names(tmp_path: Path) -> None:
    a, b = (jsonl(tmp_path / name, exchanges(3)) for name in ("a.jsonl", "b.jsonl"))
    c = jsonl(tmp_path / "c.jsonl", exchanges(4))
    first, second, third = (content_hash(locate(Source(path=str(p)))) for p in (a, b, c))
    assert first == second != third


def test_a_template_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="needs `completion` beside it"):
        Source(path="x", prompt="{a}")
    with pytest.raises(ValueError, match="needs `prompt` beside it"):
        Source(path="x", completion="{a}")


def test_a_template_replaces_format_and_columns() -> None:
    with pytest.raises(ValueError, match="replace `format` and `columns`"):
        Source(path="x", prompt="{a}", completion="{b}", format="alpaca")


def test_a_share_cannot_be_held_out_of_a_stream() -> None:
    with pytest.raises(ValueError, match="give a number of rows"):
        DataSettings(train=[Source(path="x")], streaming=True, holdout=0.1)
