"""YAML by the rules a newcomer expects."""

import pytest

from tunesmith.errors import SpecError
from tunesmith.yaml_text import parse_mapping, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5", 1.5),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("-3", -3),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("[a, 1]", ["a", 1]),
        ("1.2.3", "1.2.3"),
    ],
)
def test_values_mean_what_they_look_like(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_every_key_and_item_has_its_line() -> None:
    values, lines = parse_mapping("a: 1\nb:\n  c: 2\n  d:\n    - x\n    - y: 3\n", "f.yaml")
    assert values == {"a": 1, "b": {"c": 2, "d": ["x", {"y": 3}]}}
    assert lines[("b", "c")] == 3
    assert lines[("b", "d", 1, "y")] == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "f.yaml:2: a is given twice"),
        ("- 1\n- 2\n", "f.yaml:1: expected a mapping"),
        ("just words", "f.yaml:1: expected a mapping"),
        ("", "f.yaml: the file is empty"),
        ("a: [1, 2", "f.yaml: not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "f.yaml: not valid YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_mapping(text, "f.yaml")
