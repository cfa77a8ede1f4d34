"""Rows of data, drawn in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.data.preview import Preview, ShownSample
    from tunesmith.data.statistics import Bar, DataReport

SUPERVISED = "bold green"
BAR = 40
"""Characters of the longest bar."""


def draw_preview(console: Console, preview: Preview) -> None:
    """Print rows with supervised tokens coloured, then what all rows are like."""
    if not preview.train.classes:
        console.print(Text("supervised tokens are green and between ⟦ ⟧\n", style=SUPERVISED))
    for number, row in enumerate(preview.rows, start=1):
        for sample in row:
            facts = f"{sample.tokens} tokens, {sample.supervised_tokens} supervised"
            if sample.label:
                facts = f"{sample.tokens} tokens, labelled {sample.label}"
            console.rule(f"row {number}: {facts}", align="left")
            console.print(_coloured(sample))
    for title, report in (("training", preview.train), ("evaluation", preview.evaluation)):
        if report is not None:
            console.rule(title, align="left")
            _draw_report(console, report)


def _coloured(sample: ShownSample) -> Text:
    """Colour for eyes, brackets for pipes and for those who see no green."""
    text = Text()
    for piece in sample.pieces:
        if piece.supervised:
            text.append(f"⟦{piece.text}⟧", style=SUPERVISED)
        else:
            text.append(piece.text)
    return text


def _draw_report(console: Console, report: DataReport) -> None:
    for line in report.lines():
        console.print(line, markup=False, highlight=False)
    share = report.truncated / max(1, report.kept)
    console.print(f"truncated: {share:.1%} of the samples", highlight=False)
    for source in report.sources:
        for message in source.messages:
            console.print(f"  skipped: {message}", markup=False, highlight=False)
    most = max((bar.rows for bar in report.lengths), default=1)
    first = next((bar for bar in report.lengths if bar.rows), None)
    shown = report.lengths[report.lengths.index(first) :] if first else ()
    for bar in shown:
        console.print(_bar(bar, most), highlight=False)


def _bar(bar: Bar, most: int) -> str:
    drawn = "█" * max(round(BAR * bar.rows / most), 1 if bar.rows else 0)
    return f"{bar.start:>7} to {bar.stop - 1:<7} tokens {drawn} {bar.rows:,}"
