"""`tunesmith models`."""


def models() -> None:
    """List the zoo: real weights and data that need no hub, what is cached, and sizes."""
    from rich.console import Console

    from tunesmith.cli.tables import zoo_table
    from tunesmith.models.zoo import cache_dir, list_zoo

    Console().print(zoo_table(list_zoo()))
    print(f"cache: {cache_dir()} (TUNESMITH_CACHE overrides)")
