"""Built-in checks against cases worked out by hand."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tunesmith.errors import RewardError
from tunesmith.rewards.build import build_reward
from tunesmith.rewards.checks import last_fenced, numbers
from tunesmith.rewards.contract import Scored
from tunesmith.rewards.countdown import compute
from tunesmith.rewards.settings import RewardSettings


def score(reply: str, settings: dict[str, Any], **columns: Any) -> float:
    """The score of one reply."""
    kind = TypeAdapter(RewardSettings).validate_python(settings)
    (found,) = build_reward(kind)([Scored("asked", reply, columns)])
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 + 5 = 17", ["12", "5", "17"]),
        ("12-5=7", ["12", "5", "7"]),
        ("it is -7.50.", ["-7.50"]),
        ("1,234,567 and 1,2", ["1234567", "1", "2"]),
        ("\N{MINUS SIGN}3", ["-3"]),
        ("x2 v1.5", []),
        ("\u7b54\u6848\u662f42\u3002", ["42"]),  # Chinese: the answer is 42.
        ("\u7b54\u3048\u306f-3\u3067\u3059", ["-3"]),  # Japanese
        ("\u0e15\u0e2d\u0e1a5", ["5"]),  # Thai
        ("it is .5, or -.25", ["0.5", "-0.25"]),
        ("1.2.3 and ...5", ["1.2"]),
        ("2e3", ["2E+3"]),
        ("1e999999999", []),
        ("", []),
    ],
)
def test_numbers_of_a_text(text: str, expected: list[str]) -> None:
    assert [str(number) for number in numbers(text)] == expected


@pytest.mark.parametrize(
    ("reply", "settings", "expected"),
    [
        ("It is 3, no: 42", {}, 1.0),
        ("42, or 3", {}, 0.0),
        ("42, or 3", {"take": "first"}, 1.0),
        ("7 #### 42", {"after": "####"}, 1.0),
        ("42", {"after": "####"}, 0.0),
        ("#### 42 #### 1", {"after": "####"}, 0.0),
        ("forty-two", {}, 0.0),
        ("41.5", {"tolerance": 0.5}, 1.0),
        ("41.4", {"tolerance": 0.5}, 0.0),
        ("46", {"tolerance": 0.1, "relative": True}, 1.0),
        ("47", {"tolerance": 0.1, "relative": True}, 0.0),
        ("42.0", {}, 1.0),
    ],
)
def test_a_number_in_the_reply(reply: str, settings: dict[str, Any], expected: float) -> None:
    assert score(reply, {"kind": "number", **settings}, answer="so 42") == expected


def test_numbers_are_compared_exactly() -> None:
    assert score("0.3", {"kind": "number"}, answer=0.1 + 0.2) == 0.0
    assert score("12345678901234567891", {"kind": "number"}, answer=12345678901234567890) == 0.0


def test_an_exact_answer_ignores_white_space_and_case_where_asked() -> None:
    assert score(" New\n York ", {"kind": "exact"}, answer="New York") == 1.0
    assert score("new york", {"kind": "exact"}, answer="New York") == 0.0
    assert score("new york", {"kind": "exact", "ignore_case": True}, answer="New York") == 1.0
    assert score("b", {"kind": "exact"}, answer=["a", "b"]) == 1.0
    assert score("A: b", {"kind": "exact", "after": "A:"}, answer="b") == 1.0


def test_a_pattern_is_searched_or_has_to_match_the_whole() -> None:
    assert score("a\nb!", {"kind": "regex", "pattern": "a.b"}) == 1.0
    assert score("a\nb!", {"kind": "regex", "pattern": "a.b", "whole": True}) == 0.0


def test_a_broken_pattern_is_refused_in_the_run_file() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        score("", {"kind": "regex", "pattern": "("})


@pytest.mark.parametrize(("words", "expected"), [(0, 0), (2, 0), (3, -0.5), (4, -1), (9, -1)])
def test_the_length_penalty_falls_from_0_to_minus_1(words: int, expected: float) -> None:
    """Free up to 2 words, -1 from 4 words on."""
    assert score("a " * words, {"kind": "length", "free": 2, "limit": 4}) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"n": 1}', 1.0),
        ('Here:\n```json\n{"n": 1}\n```\nDone', 1.0),
        ('{"n": "1"}', 0.0),
        ('{"n": 1, "more": NaN}', 0.0),
        ('{"n": 1, "more": [-Infinity]}', 0.0),
        ("{}", 0.0),
        ("n = 1", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_of_a_shape(reply: str, expected: float) -> None:
    shape = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert score(reply, {"kind": "json_schema", "shape": shape}) == expected
    assert score(reply, {"kind": "json_schema"}, schema=shape) == expected


@pytest.mark.parametrize("schema", [{"type": "thing"}, "{type: object}", "5", [1]])
def test_a_column_that_is_no_schema_names_the_row(schema: object) -> None:
    with pytest.raises(RewardError, match=r"row 0: .*no JSON Schema"):
        score("{}", {"kind": "json_schema"}, schema=schema)


@pytest.mark.parametrize("where", ["https://example.org/a", "#/$defs/b"])
def test_a_schema_that_refers_to_what_is_not_there_is_an_error_of_the_row(where: str) -> None:
    with pytest.raises(RewardError, match=rf"row 0: .*refers to .*{where[-1]}', which is not"):
        score("{}", {"kind": "json_schema"}, schema={"$ref": where})


def test_a_number_beyond_all_floats_is_no_multiple() -> None:
    shape = {"properties": {"n": {"multipleOf": 0.1}}}
    assert score('{"n": 1e999}', {"kind": "json_schema", "shape": shape}) == 0.0


def test_the_last_block_counts_also_where_it_is_not_closed() -> None:
    assert last_fenced("```py\na\n```\n```\nb\n```") == "b"
    assert last_fenced("```py\na = 1") == "a = 1"
    assert last_fenced("plain") == "plain"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("(7 - 4) * 5", 1.0),
        ("Let me see.\n5 * (7 - 4) = 15", 1.0),
        ("7 + 4 + 5", 0.1),
        ("5 + 5 + 5", 0.0),
        ("15", 0.0),
        ("7 / 0", 0.0),
        ("__import__('os')", 0.0),
        ("5 ** 2", 0.0),
        ("", 0.0),
    ],
)
def test_countdown(reply: str, expected: float) -> None:
    assert score(reply, {"kind": "countdown"}, numbers=[7, 4, 5], target=15) == expected


def test_countdown_computes_exactly_and_refuses_what_is_long() -> None:
    assert compute("1 / 3 * 3")[0] == 1
    with pytest.raises(ValueError, match="too long"):
        compute("1+" * 200 + "1")


def test_a_missing_column_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(RewardError, match=r"row 0: .*'answer'; .*are: result"):
        score("1", {"kind": "number"}, result=1)


@pytest.mark.parametrize(
    ("kind", "columns", "why"),
    [
        ("exact", {"answer": None}, "'answer' is null"),
        ("number", {"answer": None}, "'answer' is null"),
        ("json_schema", {"schema": None}, "'schema' is null"),
        ("countdown", {"numbers": None, "target": 7}, "'numbers' is null"),
        ("countdown", {"numbers": "[3, 4]", "target": 7}, "'numbers' is .*list of numbers"),
        ("countdown", {"numbers": [3, None], "target": 7}, "'numbers' is .*list of numbers"),
    ],
)
def test_a_column_that_says_nothing_is_an_error_of_the_row(
    kind: str, columns: dict[str, Any], why: str
) -> None:
    """Null in particular: it is neither the text None nor a reason to end without a word."""
    with pytest.raises(RewardError, match=f"row 0: .*{why}"):
        score("None", {"kind": kind}, **columns)


def test_an_answer_without_a_number_is_an_error_of_the_row() -> None:
    with pytest.raises(RewardError, match="holds no number"):
        score("1", {"kind": "number"}, answer="none")


def test_rewards_are_added_by_weight_and_named_apart() -> None:
    adapter = TypeAdapter(list[RewardSettings])
    kinds = adapter.validate_python(
        [
            {"kind": "regex", "pattern": "a", "weight": 2.0},
            {"kind": "regex", "pattern": "b", "weight": -0.5},
        ]
    )
    reward = build_reward(kinds)
    rows = [Scored("", reply, {}) for reply in ("a", "b", "ab", "")]
    assert reward(rows) == [2.0, -0.5, 1.5, 0.0]
    assert reward.parts(rows) == {"regex_1": [1, 0, 1, 0], "regex_2": [0, 1, 1, 0]}


def test_on_error_gives_the_row_a_score_and_goes_on() -> None:
    kind = TypeAdapter(RewardSettings).validate_python({"kind": "number", "on_error": -1})
    rows = [Scored("", "1", {"answer": 1}), Scored("", "1", {}), Scored("", "2", {"answer": 1})]
    assert build_reward(kind)(rows) == [1.0, -1.0, 0.0]
