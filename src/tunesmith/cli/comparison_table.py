"""A comparison as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from tunesmith.report.comparison import cells, columns

if TYPE_CHECKING:
    from tunesmith.report.findings import Findings


def comparison_table(findings: Findings) -> Table:
    """Return the rows of a comparison, best first."""
    table = Table(
        title=escape(f"{findings.name}, by {findings.metric}"),
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = columns(findings)
    shown = [index for index, name in enumerate(names) if name not in _IN_REPORT_ONLY]
    for index in shown:
        table.add_column(names[index], no_wrap=index > 0, justify="right" if index else "left")
    for row in findings.rows:
        name = escape(row.name)  # `lora[rank=8]` is a name and no style
        line = [name, "failed"] if row.failed else [name, *cells(findings, row)]
        table.add_row(*(line[index] for index in shown if index < len(line)))
    return table


_IN_REPORT_ONLY = {"trains", "share", "tokens/s", "inference", "learning rate", "p"}
"""Columns for which a terminal has no room."""
