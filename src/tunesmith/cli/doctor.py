"""`tunesmith doctor`."""

from typing import Annotated

import typer


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="Also take a training step on this model and compile its blocks."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="The method whose modules are in the model's blocks then.")
    ] = "lora",
) -> None:
    """Check versions, devices and dtypes, take one training step, and see what compiles."""
    from rich.console import Console

    from tunesmith.cli.tables import proofs_table
    from tunesmith.jobs.doctor import diagnose

    checks = diagnose(model, method)
    Console().print(proofs_table(checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
