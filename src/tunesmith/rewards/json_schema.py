"""A reward for replies that are JSON of a given shape."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.errors import SetupError
from tunesmith.rewards.checks import last_fenced
from tunesmith.rewards.contract import Attempt, OpenRun, RewardKind, Scored, column

if TYPE_CHECKING:
    from jsonschema.protocols import Validator


class JsonSchema(RewardKind):
    """1 where the reply is JSON that a schema accepts, else 0 (needs `tunesmith[rewards]`)."""

    kind: Literal["json_schema"] = "json_schema"
    """Reads the reply, or its last ``` block where it has one, as JSON and checks its shape."""
    shape: dict[str, Any] | None = None
    """The JSON Schema of every row; none takes each row's own from `column`."""
    column: str = "schema"
    """Without `shape`: the column that holds the schema, as a mapping or as JSON text."""

    def attempts(self, open_run: OpenRun | None) -> Attempt:
        """Return the check; it needs no reward model.

        Raises:
            SetupError: jsonschema is not installed.
        """
        if importlib.util.find_spec("jsonschema") is None:
            raise SetupError(
                "the reward json_schema needs the package jsonschema: "
                "pip install 'tunesmith[rewards]'"
            )
        return super().attempts(open_run)

    def score(self, row: Scored) -> float:
        """Return 1.0 or 0.0.

        Raises:
            ValueError: the row has no schema, or one that is none or refers to what is not in it.
        """
        from referencing.exceptions import Unresolvable

        shape = column(row, self.column) if self.shape is None else self.shape
        validator = _validator(_read(shape) if isinstance(shape, str) else shape)
        try:
            value = json.loads(last_fenced(row.reply), parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        try:
            return float(validator.is_valid(value))
        except OverflowError:  # a number like 1e999, of which jsonschema makes an infinity
            return 0.0
        except Unresolvable as error:
            raise ValueError(f"the schema refers to {error.ref!r}, which is not in it") from None


def _refuse(name: str) -> float:
    """Refuse NaN and Infinity, which Python reads and JSON has not (RFC 8259, section 6)."""
    raise ValueError(f"{name} is no JSON")


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no JSON Schema: {error}") from None


def _validator(shape: Any) -> Validator:
    from jsonschema import SchemaError, validators
    from referencing import Registry

    if type(shape) not in {dict, bool}:
        raise ValueError(f"{shape!r} is no JSON Schema: expected an object, true or false")
    cls = validators.validator_for(shape, default=validators.Draft202012Validator)
    try:
        cls.check_schema(shape)
    except SchemaError as error:
        raise ValueError(f"{shape!r} is no JSON Schema: {error.message}") from None
    # An empty registry: without it a reference to a URL would be fetched.
    validator: Validator = cls(shape, registry=Registry())
    return validator
