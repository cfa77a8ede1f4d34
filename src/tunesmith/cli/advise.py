"""`tunesmith advise`."""

from typing import Annotated

import typer


def advise(
    model: Annotated[str, typer.Option("--model", help="Path, zoo name or Hub id.")],
    data: Annotated[str, typer.Option("--data", help="File, folder, zoo name or Hub data set.")],
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Of the GPU: 24GiB. This machine if left out."),
    ] = None,
    goal: Annotated[
        str, typer.Option("--goal", help="quality, memory, speed, many-tasks or edge.")
    ] = "quality",
) -> None:
    """Say which methods to try first, and why, with a run file that can be started."""
    from rich.console import Console

    from tunesmith.jobs.advise import advise as make_advice
    from tunesmith.jobs.advise import goal_of, place_of, told

    console = Console(highlight=False)
    device, limit = place_of(memory)
    advices = make_advice(model, data, memory=limit, goal=goal_of(goal), device=device)
    for line in told(advices):
        console.print(line, markup=False, soft_wrap=True)
    console.print("\nA run file for the first, to start with `tunesmith train`:\n")
    # Not folded at the width of the terminal: it is to be copied.
    console.print(advices[0].to_yaml(), markup=False, soft_wrap=True)
