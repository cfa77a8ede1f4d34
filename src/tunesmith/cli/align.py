"""`tunesmith align`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table


def align(
    file: Annotated[str, typer.Argument(help="Align file (YAML) with stages.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: judged.limit=64")
    ] = None,
) -> None:
    """Run stages of alignment, each on what those before it left; goes on where it was."""
    from rich.console import Console

    from tunesmith.jobs.align import align as run_alignment
    from tunesmith.jobs.align_spec import load_alignment
    from tunesmith.report.alignment import sentences

    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    found = run_alignment(load_alignment(file, overrides or []), file, say)
    if not found["verdicts"]:
        return
    console.print(policies_table(found))
    for sentence in sentences(found["verdicts"]):
        say(f"- {sentence}")


def policies_table(found: Mapping[str, Any]) -> Table:
    """Return one column a policy, for a terminal is narrow: reward, wins, KL, length, diversity."""
    from rich.table import Table

    from tunesmith.report.alignment import POLICY_COLUMNS, policy_cells

    policies = [verdict for verdict in found["verdicts"] if verdict["step"] is None]
    table = Table("", *(verdict["name"] for verdict in policies))
    for name, *cells in zip(POLICY_COLUMNS[1:], *map(policy_cells, policies), strict=True):
        table.add_row(name, *cells)
    return table
