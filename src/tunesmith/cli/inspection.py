"""Tables of what is inside an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tunesmith.jobs.inspect import InspectedAdapter, NearToken


def tables(adapter: InspectedAdapter) -> Iterator[Table]:
    """Yield a table for each thing that the adapter's method has."""
    inside = adapter.inside
    if inside is None:
        return
    if inside.delta_norms:
        yield _by_block("norm of the change of each weight", inside.delta_norms, _norm)
    if inside.ranks:
        yield _by_block("ranks kept", inside.ranks, str)
    if inside.prefix_norms:
        yield _prefixes(inside.prefix_norms)
    if inside.nearest_tokens:
        yield _tokens(inside.nearest_tokens)


def _by_block(title: str, values: Mapping[str, Any], show: Callable[[Any], str]) -> Table:
    """Return one line a block and one column a module in it."""
    rows: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        block, inside = _split(path)
        rows.setdefault(block, {})[inside] = value
    columns = list(dict.fromkeys(inside for row in rows.values() for inside in row))
    short = [column.rpartition(".")[2] for column in columns]
    heads = short if len(set(short)) == len(short) else columns
    # As narrow as it gets: seven maps a block are usual, and a cut number is none.
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("block", no_wrap=True)
    for head in heads:
        table.add_column(head.removesuffix("_proj"), overflow="fold")
    for block, row in rows.items():
        table.add_row(block, *(show(row[c]) if c in row else "" for c in columns))
    return table


def _split(path: str) -> tuple[str, str]:
    """Return the path of a module's block and its path in there: the last number ends a block."""
    found = re.match(r"(.*\.\d+)\.(.+)", path)
    return (found[1], found[2]) if found else ("", path)


def _norm(value: float) -> str:
    return f"{value:.3g}"


def _prefixes(norms: Mapping[str, tuple[float, float]]) -> Table:
    table = Table("layer", "keys", "values", title="mean length in a prefix", title_justify="left")
    for path, (keys, values) in norms.items():
        table.add_row(path, _norm(keys), _norm(values))
    return table


def _tokens(rows: list[list[NearToken]]) -> Table:
    """Return one line a row of the prompt; tokens are shown as Python writes them."""
    table = Table("row", "nearest tokens, with their cosine", title_justify="left")
    for number, row in enumerate(rows):
        shown = ", ".join(f"{near.text!r} {near.cosine:.2f}" for near in row)
        table.add_row(str(number), Text(shown))
    return table
