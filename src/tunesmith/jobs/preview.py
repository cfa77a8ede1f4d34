"""Rows as the model will see them, without loading the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.data.prepare import prepare
from tunesmith.data.preview import preview as preview_rows
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.zoo import cache_dir

if TYPE_CHECKING:
    from tunesmith.data.preview import Preview
    from tunesmith.spec import Run


def preview(run: Run, *, rows: int) -> Preview:
    """Return the first `rows` training rows as spans of text, and what all rows are like."""
    tokenizer = load_tokenizer(run.model)
    prepared = prepare(run.data, tokenizer, seed=run.seed, cache=cache_dir() / "tokens")
    return preview_rows(prepared, tokenizer, rows=rows)
