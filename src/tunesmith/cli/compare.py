"""`tunesmith compare`."""

from typing import Annotated

import typer


def compare(  # noqa: PLR0917 - typer reads options from the signature
    file: Annotated[str | None, typer.Argument(help="Comparison file (YAML).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: seeds=5")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Without a file: the model to tune.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Without a file: the rows to learn from.")
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Without a file: all, or names with commas.")
    ] = "all",
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time for everything: 20min, 2h.")
    ] = None,
) -> None:
    """Compare ways to fine-tune on the same data: quality, cost, memory, forgetting."""
    from rich.console import Console

    from tunesmith.cli.comparison_table import comparison_table
    from tunesmith.jobs.compare import compare as run_comparison
    from tunesmith.jobs.comparison_spec import comparison_from
    from tunesmith.report.recommendation import recommendation

    console = Console()
    comparison, source = comparison_from(
        file, overrides or [], model=model, data=data, methods=methods, budget=budget
    )

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    findings = run_comparison(comparison, source, say)
    console.print(comparison_table(findings))
    for sentence in recommendation(findings):
        console.print(f"- {sentence}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {comparison.directory / 'report.html'}", markup=False, soft_wrap=True)
