"""Reading files: every kind, from every place, with every damage."""

import csv
import gzip
import json
import re
import zlib
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from data_files import jsonl, values
from tunesmith.data.files import reader_of
from tunesmith.data.settings import Source
from tunesmith.data.sources import locate, read
from tunesmith.errors import DataError

ROWS = [
    {"text": "plain", "n": "1"},
    {"text": "两行\nand, a comma", "n": "2"},
    {"text": 'a "quote" and עברית', "n": "3"},
    {"text": "last 🙂", "n": "4"},
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows in the format of the path's suffix, gzipped where it says so."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    plain = path.with_name(f"plain.{kind}")
    if kind == "parquet":
        parquet.write_table(arrow.Table.from_pylist(rows), plain, row_group_size=2)
    elif kind == "json":
        plain.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        jsonl(plain, rows)
    else:
        with plain.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["text", "n"])
            writer.writeheader()
            writer.writerows(rows)
    content = plain.read_bytes()
    plain.unlink()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


KINDS = ["json", "jsonl", "csv", "parquet", "json.gz", "jsonl.gz", "csv.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    assert values(write(tmp_path / f"rows.{kind}", ROWS)) == ROWS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taken", [1, 2, 3])
def test_reading_goes_on_from_any_row(kind: str, taken: int, tmp_path: Path) -> None:
    located = locate(Source(path=str(write(tmp_path / f"rows.{kind}", ROWS))))
    whole = list(read(located))
    rest = list(read(located, whole[taken - 1].end))
    assert rest == whole[taken:]


def test_reading_goes_on_in_the_next_file_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.csv", ROWS[2:])
    located = locate(Source(path=str(tmp_path)))
    whole = list(read(located))
    for index, row in enumerate(whole):
        assert list(read(located, row.end)) == whole[index + 1 :]


def test_a_text_file_is_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeffone\n\n  two  \n三\n", encoding="utf-8")
    assert values(path) == [{"text": "one"}, {"text": "two"}, {"text": "三"}]


def test_tsv_keeps_quotes_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"Never closed\tyes\nplain\tno\n', encoding="utf-8")
    assert [row["text"] for row in values(path)] == ['"Never closed', "plain"]


def test_json_may_be_an_object_with_one_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert values(path) == ROWS


def test_json_with_an_object_a_line_is_read_as_jsonl(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.json", ROWS)
    assert values(path) == ROWS


@pytest.mark.parametrize("document", [{"a": [1], "b": [2]}, {"a": 1}, "text", {}])
def test_json_without_one_list_is_refused(document: object, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="expected an array of rows or an object with one list"):
        values(path)


def test_blank_lines_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    assert values(path)[1].startswith(f"{path}, row 3: is broken JSON")


def test_broken_jsonl_names_the_row_and_reading_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    found = values(path)
    assert found[0] == {"text": "a"}
    assert found[1].startswith(f"{path}, row 2: is broken JSON")
    assert found[2] == {"text": "c"}


@pytest.mark.parametrize(
    ("content", "row"),
    [('[{"a": 1}, {"a": }, {"a": 3}]', 2), ('[{"a": 1} {"a": 2}]', 1), ('[{"a": 1}', 1)],
)
def test_broken_json_names_the_row(content: str, row: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"rows.json, row {row}: is broken JSON"):
        values(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "txt", "jsonl.gz"])
def test_an_empty_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(gzip.compress(b"") if kind.endswith("gz") else b"")
    with pytest.raises(DataError, match=r"rows\.\S+: .*(empty|is broken JSON)"):
        values(path)


def test_a_header_alone_is_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n")
    with pytest.raises(DataError, match="the file is empty; expected at least one row"):
        values(path)


@pytest.mark.parametrize(("line", "kind"), [("3", "int"), ('"words"', "str"), ("[1]", "list")])
def test_a_row_that_is_no_mapping_is_bad(line: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    assert f"row 2: is a {kind} ({line}), expected a mapping" in values(path)[1]


def test_a_csv_row_with_another_number_of_fields_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,b\nc\nd,e\n")
    found = values(path)
    assert found[1] == f"{path}, row 2: has 1 fields where the header names 2"
    assert found[2] == {"text": "d", "label": "e"}


def test_a_csv_quote_in_the_wrong_place_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"a"b,c\nd,e\n')
    found = values(path)
    assert "row 1: is broken CSV" in found[0]
    assert found[1] == {"text": "d", "label": "e"}


@pytest.mark.parametrize(
    ("name", "header", "sign"),
    [("a.csv", "text;label", ";"), ("a.csv", "text\tlabel", "\\t"), ("a.tsv", "text,label", ",")],
)
def test_a_file_with_other_separators_than_its_suffix_says_is_refused(
    tmp_path: Path, name: str, header: str, sign: str
) -> None:
    path = tmp_path / name
    path.write_text(f"{header}\n{header}\n")
    with pytest.raises(DataError, match=f"is parted by '{re.escape(sign)}'"):
        values(path)


@pytest.mark.parametrize("header", ["a,,b", "a,a"])
def test_a_csv_without_column_names_is_refused(header: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(header + "\n1,2,3\n")
    with pytest.raises(DataError, match="empty or repeated column name"):
        values(path)


def test_utf_16_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,b\n", encoding="utf-16")
    with pytest.raises(DataError, match="is UTF-16 text, expected UTF-8"):
        values(path)


def test_a_tool_call_of_a_parquet_file_has_its_own_arguments_alone(tmp_path: Path) -> None:
    def row(tool: str, key: str, value: object) -> dict[str, object]:
        schema = {"type": "object", "properties": {key: {"type": "string"}}}
        call = {"function": {"name": tool, "arguments": {key: value}}}
        turns = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        return {"messages": turns, "tools": [{"name": tool, "parameters": schema}], "id": None}

    rows = [row("weather", "city", "Paris"), row("tip", "bill", 5)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == rows


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_a_damaged_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(b"this is nothing of the kind")
    with pytest.raises(DataError, match=rf"rows.{kind}: (not a readable|cannot be read)"):
        values(path)


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", ROWS * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises((DataError, zlib.error), match="cannot be read"):
        values(path)


def test_json_nested_too_deeply_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000 + "\n")
    assert "nested too deeply" in values(path)[0] or "is broken JSON" in values(path)[0]


def test_suffixes_are_known_in_any_case_and_gzipped() -> None:
    assert reader_of(Path("A.JSONL.GZ")) is reader_of(Path("a.jsonl"))
    assert reader_of(Path("a.parquet.gz")) is None
    assert reader_of(Path("a.gz")) is None
    assert reader_of(Path("noname")) is None
