"""`tunesmith combine`."""

from typing import Annotated

import typer


def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Adapter or run directories with their weights, as in runs/a=0.7."),
    ],
    *,
    out: Annotated[str, typer.Option(help="Directory to write the new adapter into.")],
    method: Annotated[
        str, typer.Option(help="linear, cat, svd, ties, dare_linear or dare_ties.")
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Share of each delta that ties and dare keep; 0.2 if none.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Rank of the result where it is cut; the adapters' largest if none."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of dare's random choice.")] = 0,
    base: Annotated[
        str | None, typer.Option(help="The base model, if the adapters do not say it.")
    ] = None,
) -> None:
    """Combine LoRA adapters of one base into a new one, by weights that may be negative."""
    from tunesmith.jobs.combine import combine_adapters, weighted

    kept = combine_adapters(
        weighted(adapters), out, method=method, density=density, rank=rank, seed=seed, base=base
    )
    print(f"wrote {out}; its rank keeps {kept:.1%} of the combined change (squared norm)")
