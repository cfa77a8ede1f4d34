"""Rows as the model will see them, without loading the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.data.preview import preview as preview_rows
from tunesmith.jobs.labelled import classifies, read_data
from tunesmith.models.loading import load_tokenizer

if TYPE_CHECKING:
    from tunesmith.data.preview import Preview
    from tunesmith.spec import Run


def preview(run: Run, *, rows: int) -> Preview:
    """Return the first `rows` training rows as spans of text, and what all rows are like."""
    tokenizer = load_tokenizer(run.model, chats=not classifies(run))
    _, prepared = read_data(run, tokenizer)
    return preview_rows(prepared, tokenizer, rows=rows)
