"""`tunesmith schema`."""


def schema() -> None:
    """Print the JSON Schema of a run file, so that editors complete it."""
    import json

    from tunesmith.spec import schema as run_schema

    print(json.dumps(run_schema(), indent=2, ensure_ascii=False))
