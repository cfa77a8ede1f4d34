"""`tunesmith features`."""

from typing import Annotated

import typer


def features(
    run_file: Annotated[str, typer.Argument(help="Run file of a classification (YAML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings over the file's: features.classifier=linear_svm"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run directory and start again.")
    ] = False,
) -> None:
    """Classify without training the model: its embeddings, and scikit-learn on top."""
    from rich.console import Console

    from tunesmith.jobs.features import learn_from_features
    from tunesmith.jobs.features_spec import load_feature_file

    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    learn_from_features(load_feature_file(run_file, overrides or []), say, overwrite=overwrite)
