"""`tunesmith import-adapter`."""

from typing import Annotated

import typer


def import_adapter(
    directory: Annotated[str, typer.Argument(help="What AdapterHub's save_adapter wrote.")],
    base: Annotated[str, typer.Option(help="Its base model: a path, zoo name or Hub id.")],
    out: Annotated[str, typer.Option(help="Directory to write; must not exist.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the adapter; its own where none is given.")
    ] = None,
) -> None:
    """Read an adapter of AdapterHub's `adapters` package and write it as one of Tunesmith's."""
    from rich.console import Console

    from tunesmith.cli.tables import proofs_table
    from tunesmith.jobs.import_adapter import import_adapter as import_from

    imported = import_from(directory, base=base, out=out, name=name)
    Console().print(proofs_table(imported.proofs))
    settings = imported.method.model_dump(exclude_none=True, exclude_defaults=True)
    said = ", ".join(f"{key} {value}" for key, value in settings.items())
    kind = type(imported.method).model_fields["name"].default
    print(f"{kind}{f' ({said})' if said else ''}: {imported.parameters:,} parameters")
    print(f"wrote {out}")
