"""`tunesmith predict`."""

from typing import Annotated

import typer


def predict(
    run_directory: Annotated[
        str, typer.Argument(help="Run directory of a classifier or reward model.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the run's: engine.device=cpu")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A text to classify; may be given several times.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="A file of texts: one a line, or with the columns of the run's own rows."
        ),
    ] = None,
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a text, with all probabilities.")
    ] = False,
) -> None:
    """Say the label of texts and how probable it is, or the reward of replies."""
    from dataclasses import asdict

    from tunesmith.errors import SpecError
    from tunesmith.jobs.predict import predict as predict_texts
    from tunesmith.jobs.predict import predict_file
    from tunesmith.json_text import strict_json

    if not text and not file:
        raise SpecError("nothing to classify; give --text or --file")
    own = overrides or []
    found = predict_texts(run_directory, text, overrides=own) if text else []
    found += predict_file(run_directory, file, overrides=own) if file else []
    for prediction in found:
        if as_json:
            print(strict_json(asdict(prediction)))
            continue
        share = prediction.probabilities.get(prediction.said)
        sure = "" if share is None else f"\t{share:.3f}"
        print(f"{prediction.said}{sure}\t{prediction.text}")
