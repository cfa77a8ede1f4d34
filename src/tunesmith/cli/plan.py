"""`tunesmith plan`."""

from typing import Annotated

import typer


def plan(  # noqa: PLR0917 - typer reads options from the signature
    run_file: Annotated[str, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: method.rank=32")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cuda or cpu.")] = "cuda",
    devices: Annotated[
        str, typer.Option("--devices", help="Numbers of devices, with commas: 1,2,8.")
    ] = "1,2,4,8",
    memory: Annotated[
        str | None, typer.Option("--memory", help="What one device has: 24GiB.")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Take three small steps here and compare."),
    ] = False,
) -> None:
    """Predict parameters and memory of a run before anything is loaded."""
    from rich.console import Console

    from tunesmith.cli.plan_tables import (
        parameters_table,
        phases_lines,
        plan_table,
        remedies_lines,
    )
    from tunesmith.jobs.plan import plan as make_plan
    from tunesmith.jobs.remedies import remedies
    from tunesmith.measure.memory_plan import bytes_of, counts_of
    from tunesmith.spec import load_run_file

    limit = None if memory is None else bytes_of(memory)
    numbers = counts_of(devices)
    planned = make_plan(load_run_file(run_file, overrides or []), device=device)
    console = Console()
    console.print(parameters_table(planned.counts))
    console.print(plan_table(planned, numbers, limit))
    for line in phases_lines(planned):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if probe:
        from tunesmith.cli.plan_tables import probe_lines, probe_table
        from tunesmith.jobs.probe import probe as take_steps

        probed = take_steps(planned)
        console.print(probe_table(probed))
        for line in probe_lines(probed):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if limit is not None:
        for line in remedies_lines(planned, remedies(planned, limit), limit):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
