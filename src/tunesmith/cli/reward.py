"""`tunesmith reward test`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tunesmith.jobs.reward_test import RewardTest

reward_app = typer.Typer(help="Try a reward before a run depends on it.", no_args_is_help=True)


@reward_app.callback()
def _group() -> None:
    """Try a reward before a run depends on it."""


@reward_app.command("test")
def reward_test_command(  # noqa: PLR0917 - typer reads options from the signature
    file: Annotated[
        str | None, typer.Argument(help="Python file with the reward function.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the reward: tolerance=0.01")
    ] = None,
    data: Annotated[str, typer.Option("--data", help="Rows with a prompt and a reply.")] = "",
    function: Annotated[str, typer.Option("--function", help="Function in the file.")] = "reward",
    kind: Annotated[
        str | None, typer.Option("--kind", help="Instead of a file: number, regex, code, ...")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Column with the prompt, where it is unusual.")
    ] = None,
    reply: Annotated[
        str | None, typer.Option("--reply", help="Column with the reply to score.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows.")] = None,
) -> None:
    """Score the rows of a file: a table of scores, what they are like, and every error."""
    from rich.console import Console

    from tunesmith.data.settings import Source
    from tunesmith.errors import SpecError
    from tunesmith.jobs.reward_test import reward_settings, reward_test
    from tunesmith.spec import apply_override

    given = list(settings or [])
    if file is not None and kind is not None:
        given, file = [file, *given], None  # the first setting stands where a file would
    if (file is None) == (kind is None) or not data:
        raise SpecError("give a Python file or --kind, and --data with rows to score")
    values: dict[str, object] = (
        {"kind": kind} if file is None else {"kind": "file", "path": file, "function": function}
    )
    for setting in given:
        apply_override(values, setting, {})
    columns = {
        ours: theirs for ours, theirs in (("prompt", prompt), ("completion", reply)) if theirs
    }
    source = Source(path=data, columns=columns)
    result = reward_test(reward_settings(values), source, limit=limit)
    console = Console()
    console.print(scores_table(result))
    console.print(numbers_table(result))
    for row in result.errors:
        console.print(f"error: {row.place}: {row.error}", markup=False, soft_wrap=True)
    if result.errors:
        raise typer.Exit(1)


def scores_table(result: RewardTest) -> Table:
    """Return one line a row: place, what was asked and said, and the score."""
    from rich.table import Table
    from rich.text import Text

    table = Table("row", "prompt", "reply", result.label)
    for row in result.rows:
        score = "error" if row.score is None else f"{row.score:.4g}"
        cells = (_short(row.row.prompt), _short(row.row.reply))
        table.add_row(row.place.rpartition("row ")[2], *map(Text, cells), score)
    return table


def numbers_table(result: RewardTest) -> Table:
    """Return what describes all scores."""
    from rich.table import Table

    table = Table("", result.label)
    for name, number in result.numbers().items():
        table.add_row(name, f"{number:.4g}")
    return table


def _short(text: str, most: int = 48) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
