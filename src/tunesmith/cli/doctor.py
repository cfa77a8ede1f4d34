"""`tunesmith doctor`."""

from typing import Annotated

import typer


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Also take one training step on this model.")
    ] = None,
) -> None:
    """Check versions, devices and dtypes, and take one training step."""
    from rich.console import Console

    from tunesmith.cli.tables import proofs_table
    from tunesmith.jobs.doctor import diagnose

    checks = diagnose(model)
    Console().print(proofs_table(checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
