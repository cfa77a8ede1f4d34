"""`tunesmith eval`."""

from typing import Annotated

import typer


def evaluate(
    run_directory: Annotated[str, typer.Argument(help="Run directory, as in runs/demo.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the run's: evaluation.limit=100")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Evaluate on this file instead of the run's own data.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Evaluate the untuned model as well.")
    ] = True,
) -> None:
    """Evaluate a run's result, beside the untuned model, on its own or other data."""
    from rich.console import Console

    from tunesmith.cli.tables import metrics_table
    from tunesmith.jobs.evaluate import evaluate as evaluate_run

    outcome = evaluate_run(run_directory, data=data, base=base, overrides=overrides or [])
    Console().print(metrics_table(outcome))
