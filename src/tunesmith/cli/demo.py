"""`tunesmith demo`."""

from typing import Annotated

import typer


def demo(
    output: Annotated[str, typer.Option(help="Folder for the run directory.")] = "runs",
) -> None:
    """Teach SmolLM2 to judge movie sentences with LoRA, and show before and after."""
    from tunesmith.jobs.demo import demo as run_demo

    run_demo(output)
