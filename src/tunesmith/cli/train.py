"""`tunesmith train`."""

from typing import Annotated

import typer


def train(
    run_file: Annotated[str, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: method.rank=32")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run directory and start again.")
    ] = False,
) -> None:
    """Train the run that a file describes."""
    from tunesmith.jobs.train import train as train_run
    from tunesmith.spec import load_run_file

    train_run(load_run_file(run_file, overrides or []), resume=resume, overwrite=overwrite)
