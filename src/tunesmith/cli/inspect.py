"""`tunesmith inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tunesmith.jobs.inspect import InspectedAdapter


def inspect(
    path: Annotated[str, typer.Argument(help="Run directory or adapter directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tokens: Annotated[
        int, typer.Option(min=1, help="Near tokens to show of each row of a prompt.")
    ] = 3,
    base: Annotated[
        str | None, typer.Option(help="The base model, if the adapter does not say where it is.")
    ] = None,
) -> None:
    """Print what a trained adapter is, and what training made of its method."""
    from rich.console import Console

    from tunesmith.cli.inspection import tables
    from tunesmith.jobs.inspect import inspect_result
    from tunesmith.json_text import strict_json

    found = inspect_result(path, tokens=tokens, base=base)
    if as_json:
        print(strict_json(found.to_json(), indent=2))
        return
    console = Console()
    if found.missing_base is not None:
        print(f"only the files are described, not what is in them: {found.missing_base}")
    if found.starts_from is not None:
        print(f"starts from {found.starts_from}, whose adapter was merged into the base")
    for adapter in found.adapters:
        _say(adapter)
        for table in tables(adapter):
            console.print(table)
    for name, finding in found.findings.items():
        print(f"{name}: {strict_json(finding, indent=2)}")


def _say(adapter: InspectedAdapter) -> None:
    """Print what the files of one adapter say."""
    settings = dict(adapter.method)
    method = settings.pop("name", None) or settings.get("peft_type", "unknown")
    print(f"{adapter.directory}: adapter {adapter.name!r}, {method}")
    print(f"  base        {adapter.base or 'not said'}")
    print(f"  parameters  {adapter.parameters:,} ({adapter.bytes_on_disk:,} bytes on disk)")
    print(f"  settings    {', '.join(f'{k}: {v}' for k, v in settings.items() if v is not None)}")
    for group in adapter.tensors:
        shape = " x ".join(map(str, group.shape))
        print(f"  {group.count:>4} x  {group.pattern} ({shape}) {group.dtype}")
    if adapter.inside is not None and adapter.inside.changed_share is not None:
        print(f"  changed     {adapter.inside.changed_share:.3%} of the elements it could change")
