"""JSON that every program can read: null where a number is not finite, for which it has no word."""

from __future__ import annotations

import json
import math
from typing import Any


def strict_json(content: object, *, indent: int | None = None) -> str:
    """Return `content` as JSON text, with null for NaN and infinities."""
    return json.dumps(finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def parse_json(text: str) -> Any:
    """Return what JSON text holds.

    NaN and infinities, which earlier versions wrote as Python's bare words, are None as well.

    Raises:
        ValueError: it is not JSON.
    """
    return json.loads(text, parse_constant=lambda _: None)


def finite(content: Any) -> Any:
    """Return nested `content` with None for every number that is not finite."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
