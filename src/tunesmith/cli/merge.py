"""`tunesmith merge`."""

from typing import Annotated

import typer


def merge(
    run_directory: Annotated[str, typer.Argument(help="Run directory, as in runs/demo.")],
    to: Annotated[str, typer.Option(help="Directory to write; must not exist.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16; the model's own dtype where none is given."),
    ] = None,
) -> None:
    """Fold a run's result into the weights and write a plain transformers directory."""
    from rich.console import Console

    from tunesmith.cli.tables import proofs_table
    from tunesmith.jobs.merge import merge as merge_run

    proofs = merge_run(run_directory, to, dtype=dtype)
    Console().print(proofs_table(proofs))
    print(f"wrote {to}")
