"""Recognising formats, and what each row becomes."""

import json
from pathlib import Path

import pytest

from data_files import jsonl
from tunesmith.data.conversation import Conversation, Text
from tunesmith.data.formats import Layout, fill, layout_of
from tunesmith.data.settings import Source
from tunesmith.data.sources import locate, read
from tunesmith.errors import DataError

ASKED = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "hello"}
TOOL = {"name": "tip", "description": "Tips.", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "tip", "arguments": {"bill": 50}}
CANONICAL_CALL = {"type": "function", "function": CALL}
CANONICAL_TOOL = {"type": "function", "function": TOOL}

RECOGNISED = {
    "alpaca": {"instruction": "hi", "input": "", "output": "hello"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    },
    "messages": {"messages": [ASKED, SAID]},
    "prompt_completion": {"prompt": "hi", "completion": "hello"},
    "text_label": {"text": "hi", "label": "hello", "id": 7},
}


def recognise(folder: Path, row: object, **settings: object) -> Layout:
    path = jsonl(folder / "rows.jsonl", [row])
    return layout_of(locate(Source(path=str(path), **settings)))


def converted(folder: Path, row: dict[str, object], **settings: object) -> Conversation:
    return recognise(folder, row, **settings).convert(row)


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_format_is_recognised_by_its_keys_and_becomes_turns(name: str, tmp_path: Path) -> None:
    layout = recognise(tmp_path, RECOGNISED[name])
    assert layout.name == name
    assert layout.convert(RECOGNISED[name]) == Conversation((ASKED, SAID))


def test_text_stays_text(tmp_path: Path) -> None:
    assert converted(tmp_path, {"text": "long ago", "id": 1}) == Text("long ago")


def test_an_unknown_format_shows_the_keys_found_and_the_formats_known(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        recognise(tmp_path, {"question": "a", "answer": "b"})
    message = str(caught.value)
    assert "rows.jsonl, row 1: no known format has the keys question, answer" in message
    assert "alpaca: instruction, output" in message
    assert "messages: messages" in message
    assert "`columns`" in message


def test_a_format_that_is_named_is_not_guessed(tmp_path: Path) -> None:
    row = {"text": "hi", "label": "hello"}
    assert converted(tmp_path, row, format="text") == Text("hi")


def test_columns_are_renamed(tmp_path: Path) -> None:
    row = {"mr": "hi", "ref": "hello"}
    columns = {"prompt": "mr", "completion": "ref"}
    assert converted(tmp_path, row, columns=columns) == Conversation((ASKED, SAID))


def test_a_renamed_column_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'mr', which `columns` names; its columns are a"):
        recognise(tmp_path, {"a": "hi"}, columns={"prompt": "mr"})


def test_a_row_that_lacks_a_column_is_bad(tmp_path: Path) -> None:
    layout = recognise(tmp_path, RECOGNISED["alpaca"])
    with pytest.raises(DataError, match="has no column 'output', which format alpaca needs"):
        layout.convert({"instruction": "hi"})


def test_templates_fill_in_columns(tmp_path: Path) -> None:
    row = {"mr": "hi", "score": 3, "ok": True, "more": {"a": "é"}}
    sample = converted(tmp_path, row, prompt="{{Say}}: {mr} {score}", completion="{ok} {more}")
    assert [m["content"] for m in sample.messages] == ["{Say}: hi 3", 'true {"a": "é"}']


def test_a_template_with_an_unknown_column_names_the_columns() -> None:
    with pytest.raises(DataError, match=r"names the column 'x'; the columns are a, b"):
        fill("{x}", {"a": 1, "b": 2})


def test_a_template_never_reaches_into_objects() -> None:
    with pytest.raises(DataError, match=r"names the column 'a.__class__'"):
        fill("{a.__class__}", {"a": "text"})


def test_a_malformed_template_says_how_to_write_a_brace() -> None:
    with pytest.raises(DataError, match=r"is malformed .*; write a brace as `{{`"):
        fill("{a", {"a": 1})


def test_the_system_turn_goes_before_rows_that_have_none(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "own"}, ASKED, SAID]}
    layout = recognise(tmp_path, own, system="default")
    assert layout.convert(own).messages[0]["content"] == "own"
    assert layout.convert({"messages": [ASKED, SAID]}).messages[0] == {
        "role": "system",
        "content": "default",
    }


def test_a_system_column_wins_over_the_default(tmp_path: Path) -> None:
    row = RECOGNISED["sharegpt"] | {"system": "column"}
    assert converted(tmp_path, row, system="default").messages[0]["content"] == "column"


def test_alpaca_joins_instruction_and_input_and_carries_history(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["hi", "hello"]]}
    sample = converted(tmp_path, row)
    assert [m["content"] for m in sample.messages] == ["hi", "hello", "Add\n\n1 2", "3"]


def test_sharegpt_with_tools_becomes_openai_s_tool_calls(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "7.5"},
            {"from": "gpt", "value": "hello"},
        ],
        "tools": json.dumps([TOOL]),
    }
    assert converted(tmp_path, row) == Conversation(
        (
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [CANONICAL_CALL]},
            {"role": "tool", "content": "7.5"},
            SAID,
        ),
        (CANONICAL_TOOL,),
    )


def test_openai_messages_keep_ids_and_parse_arguments(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": CALL | {"arguments": '{"bill": 50}'}}
    row = {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "7.5"}]},
            SAID,
        ],
        "tools": [CANONICAL_TOOL],
    }
    sample = converted(tmp_path, row)
    assert sample.messages[1]["tool_calls"] == [CANONICAL_CALL | {"id": "c1"}]
    assert sample.messages[2] == {"role": "tool", "content": "7.5", "tool_call_id": "c1"}
    assert sample.tools == (CANONICAL_TOOL,)


def test_prompt_and_completion_may_be_messages(tmp_path: Path) -> None:
    row = {"prompt": [ASKED], "completion": [SAID]}
    assert converted(tmp_path, row) == Conversation((ASKED, SAID))
    mixed = {"prompt": "hi", "completion": [SAID]}
    assert converted(tmp_path, mixed) == Conversation((ASKED, SAID))


def test_conversations_may_be_written_as_openai_writes_turns(tmp_path: Path) -> None:
    assert converted(tmp_path, {"conversations": [ASKED, SAID]}) == Conversation((ASKED, SAID))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "'messages' is not a list of turns"),
        ({"messages": "hi"}, "'messages' is not a list of turns"),
        ({"messages": ["hi"]}, "turn 1 has no text under 'role'"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'; use one"),
        ({"messages": [ASKED, {"role": "assistant"}]}, r"turn 2 \(assistant\) has no 'content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "part of type 'image_url'; only text",
        ),
        ({"messages": [ASKED, SAID | {"tool_calls": [{"x": 1}]}]}, "a tool call without a name"),
        ({"messages": [ASKED, SAID], "tools": "{"}, "'tools' is not JSON"),
        ({"messages": [ASKED, SAID], "tools": [{}]}, "'tools' holds a tool without a name"),
        ({"conversations": [{"from": "function_call", "value": "no"}]}, "turn 1 is not JSON"),
        ({"instruction": "a", "output": None}, "'output' is null; expected text"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' is not a list of"),
        ({"text": None}, "'text' is null"),
        ({"text": "a\ud83d"}, "'text' holds half a surrogate pair at character 2"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(
    row: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    layout = layout_of(locate(Source(path=str(path))))
    with pytest.raises(DataError, match=message):
        layout.convert(row)


def test_bytes_that_are_not_utf_8_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    layout = layout_of(locate(Source(path=str(path))))
    row = next(read(locate(Source(path=str(path)))))
    with pytest.raises(DataError, match="a byte that is not UTF-8 at character 4; save the file"):
        layout.convert(row.values)


@pytest.mark.parametrize("half", ["arguments", "tools"])
def test_half_a_surrogate_pair_is_noticed_in_calls_and_tools(half: str, tmp_path: Path) -> None:
    texts = {"arguments": "a", "tools": "a"} | {half: "\ud83d"}
    function = {"name": "f", "arguments": {"text": texts["arguments"]}}
    row = {
        "messages": [
            {"role": "user", "content": "ask"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        ],
        "tools": [{"name": "f", "description": texts["tools"]}],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match="holds half a surrogate pair"):
        layout_of(locate(Source(path=str(path)))).convert(row)


def test_no_readable_row_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("broken\nbroken\n")
    with pytest.raises(DataError, match=r"rows.jsonl, row 1: is broken JSON"):
        layout_of(locate(Source(path=str(path))))


def test_equal_prompts_have_equal_hashes_whatever_the_reply() -> None:
    one, two = (Conversation((ASKED, {"role": "assistant", "content": c})) for c in "ab")
    other = Conversation(({"role": "user", "content": "else"}, SAID))
    assert one.prompt_hash == two.prompt_hash != other.prompt_hash
    assert Text("a").prompt_hash != Text("b").prompt_hash
