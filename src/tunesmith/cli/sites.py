"""`tunesmith sites`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tunesmith.jobs.sites import BlockGroup, MappedSite


def sites(
    model: Annotated[str, typer.Argument(help="A path, zoo name or Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print where methods attach to a model, from its config alone; no weights are loaded."""
    import json

    from rich.console import Console

    from tunesmith.jobs.sites import map_sites

    found = map_sites(model)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    console = Console()
    print(f"{found.model}: model type {found.model_type}")
    for group in found.groups:
        console.print(_table(group))
    outside = {
        "backbone": found.backbone or "the model itself",
        "embedding": found.embedding,
        "final norm": found.final_norm,
        "encoder norm": found.encoder_norm,
        "head": found.head,
        "classifier": ", ".join(found.classifier) or None,
    }
    for name, path in outside.items():
        if path is not None:
            print(f"{name:<13} {path}")
    print(f"targets: [{', '.join(found.names)}] or all")


def _table(group: BlockGroup) -> Table:
    """Return one line a site, and what else a block has."""
    from rich.table import Table

    blocks = "1 block" if group.count == 1 else f"{group.count} blocks alike"
    table = Table(
        *("site", "module", "kind", "in -> out", "columns"),
        title=f"{group.path} ({group.stack}, {blocks})",
        title_justify="left",
    )
    for site in group.sites:
        size = f"{site.in_features} -> {site.out_features}"
        table.add_row(site.name, site.module, _kind(site), size, _columns(site))
    table.add_section()
    table.add_row("attention.out", group.attention_out, "output")
    if group.cross_out is not None:
        table.add_row("cross.out", group.cross_out, "output")
    table.add_row("mlp.out", group.mlp_out, "output")
    for norm in group.norms:
        table.add_row("norm", norm, "norm")
    return table


def _kind(site: MappedSite) -> str:
    return site.kind if site.num_experts is None else f"{site.num_experts} {site.kind}"


def _columns(site: MappedSite) -> str:
    """Return ranges of columns, the middle of many left out."""
    ranges = [f"{start}:{stop}" for start, stop in site.columns or ()]
    if len(ranges) > 3:
        ranges = [*ranges[:2], f"... {len(ranges)} ranges"]
    return " ".join(ranges)
