"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from tunesmith.models.zoo import ZooStatus
    from tunesmith.types import Proof


def metrics_table(by_model: Mapping[str, Mapping[str, float]]) -> Table:
    """Return metrics as rows, the untuned and the tuned model as columns."""
    table = Table("metric", *by_model, title="evaluation")
    names = list(dict.fromkeys(name for metrics in by_model.values() for name in metrics))
    for name in names:
        table.add_row(name, *(_number(metrics.get(name)) for metrics in by_model.values()))
    return table


def proofs_table(proofs: Sequence[Proof]) -> Table:
    """Return one line a proof or check: whether it holds, its name and what was seen."""
    table = Table("", "check", "seen")
    for proof in proofs:
        mark = "[green]ok[/green]" if proof.passed else "[red]FAILED[/red]"
        table.add_row(mark, proof.name, proof.detail)
    return table


def zoo_table(entries: Sequence[ZooStatus]) -> Table:
    """Return one line an entry: name, kind, size, whether it is cached, what it is."""
    table = Table("name", "kind", "cached", "size", "what it is")
    for entry in entries:
        size = megabytes(entry.bytes_on_disk if entry.cached else entry.bytes_to_download)
        table.add_row(entry.name, entry.kind, "yes" if entry.cached else "no", size, entry.about)
    return table


def megabytes(size: int) -> str:
    """Return bytes as megabytes."""
    return f"{size / 1e6:,.0f} MB"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4g}"
