"""JSON text that every program can read."""

import json
import math

import pytest

from tunesmith.json_text import parse_json, strict_json


@pytest.mark.parametrize("indent", [None, 2])
def test_numbers_that_are_not_finite_are_null_at_every_depth(indent: int | None) -> None:
    content = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, 2)}], "d": "NaN", "e": True}
    text = strict_json(content, indent=indent)
    read = json.loads(text, parse_constant=pytest.fail)
    assert read == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": True}


def test_text_stays_as_it_is_written() -> None:
    assert strict_json({"reply": "\u4f60\u597d"}) == '{"reply": "\u4f60\u597d"}'


def test_the_bare_words_of_earlier_versions_are_read_as_null() -> None:
    assert parse_json('{"a": NaN, "b": [Infinity, -Infinity, 1.0]}') == {
        "a": None,
        "b": [None, None, 1.0],
    }


def test_what_is_no_json_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        parse_json("{NaN")
