"""`tunesmith data show`."""

from typing import Annotated

import typer

data_app = typer.Typer(help="Look at data as the model will see it.", no_args_is_help=True)


@data_app.callback()
def _group() -> None:
    """Look at data as the model will see it."""


@data_app.command("show")
def show(
    run_file: Annotated[str, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: data.max_length=256")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows to print.")] = 3,
) -> None:
    """Print rows with the template applied and supervised tokens coloured, and lengths."""
    from rich.console import Console

    from tunesmith.cli.previews import draw_preview
    from tunesmith.jobs.preview import preview
    from tunesmith.spec import load_run_file

    draw_preview(Console(), preview(load_run_file(run_file, overrides or []), rows=rows))
