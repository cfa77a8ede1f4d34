"""YAML with line numbers and without surprises.

Read by the YAML 1.2 rules a newcomer expects: `no` is a word and `1e-4` is a number (PyYAML's
YAML 1.1 makes them False and a string), and a key given twice is an error.
"""

import re
from typing import Any, TypeAlias

import yaml

from tunesmith.errors import SpecError

Place: TypeAlias = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with 1.2's booleans and floats."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.I), None)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$", re.I),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """Return what `text` means as a YAML value, as on the right side of an override."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"{text!r} is not a YAML value: {_problem(error)}") from error


def parse_mapping(text: str, source: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """Return the mapping that `text` holds, and the 1-based line of every key and item in it.

    Raises:
        SpecError: not YAML, a key twice, or no mapping; names `source` and the line.
    """
    try:
        node = yaml.compose(text, _Loader)
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: not valid YAML: {_problem(error)}") from error
    if node is None:
        raise SpecError(f"{source}: the file is empty; a run file has keys such as data")
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(
            f"{source}:{node.start_mark.line + 1}: expected a mapping with keys such as model, "
            f"method and data, not a {_kind(node)}"
        )
    lines: dict[Place, int] = {}
    _collect_lines(node, (), lines, source)
    return values, lines


def _kind(node: yaml.Node) -> str:
    return "list" if isinstance(node, yaml.SequenceNode) else "single value"


def _collect_lines(node: yaml.Node, place: Place, lines: dict[Place, int], source: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*place, index)] = item.start_mark.line + 1
            _collect_lines(item, (*place, index), lines, source)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:
                raise SpecError(f"{source}:{line}: {dotted(here)} is given twice")
            lines[here] = line
            _collect_lines(value, here, lines, source)


def dotted(place: Place) -> str:
    """Return `place` the way an override names it: data.train.0.path."""
    return ".".join(str(part) for part in place)


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return str(error)
