"""Filling the pages that lie in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

_HERE = Path(__file__).parent


def fill(template: str, /, **values: Any) -> str:
    """Return a template of this folder with `values`, and the common style as `style`."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_file(template))
    return page.render(style=_file("page.css"), **values)


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
