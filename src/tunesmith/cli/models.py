"""`tunesmith models`."""

from typing import Annotated

from typer import Argument


def models(
    names: Annotated[
        list[str] | None,
        Argument(help="Fetch these now, so that nothing is downloaded later; without, list all."),
    ] = None,
) -> None:
    """List the zoo: real weights and data that need no hub, what is cached, and sizes."""
    from rich.console import Console

    from tunesmith.cli.tables import zoo_table
    from tunesmith.models.zoo import cache_dir, list_zoo, zoo_directories

    if names:
        for name, directory in zoo_directories(names):
            print(f"{name}: {directory}")
        return
    Console().print(zoo_table(list_zoo()))
    print(f"cache: {cache_dir()} (TUNESMITH_CACHE overrides)")
