"""A run for a model and data of which nothing else is said: the task is read off the rows."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from tunesmith.data.formats import layout_of
from tunesmith.data.settings import Source
from tunesmith.data.sources import locate, read
from tunesmith.errors import SpecError
from tunesmith.models.settings import ModelSettings
from tunesmith.models.skeleton import ModelKind, config_of, kind_of

Task = Literal["sft", "classification"]


class Purpose(NamedTuple):
    """What a model is to learn from some data."""

    task: Task
    rows: int
    """Rows of the data."""
    kind: ModelKind
    """Of the model."""
    metric: str
    """What it is judged by unless said otherwise."""
    settings: dict[str, Any]
    """The run, as a run file has it."""


def default_run(model: str, data: str, *, holdout: float = 0.2) -> Purpose:
    """Return the run that tunes `model` on `data` with nothing else said.

    Rows of `text` and `label` are classified; all others are conversations to learn from.

    Args:
        model: a path, zoo name or Hub id.
        data: a file, folder, zoo name or Hub data set.
        holdout: share of the rows that is kept to judge by.

    Raises:
        ModelError: there is no such model.
        DataError: there is no such data, or its rows are in no known format.
        SpecError: an encoder and rows without labels, which it cannot learn from.
    """
    source = locate(Source(path=data))
    task: Task = "classification" if layout_of(source).name == "text_label" else "sft"
    kind = kind_of(config_of(ModelSettings(name=model)))
    if kind == "encoder" and task == "sft":
        raise SpecError(
            f"{model} is an encoder, which classifies texts, and {data} has no rows of `text` and "
            "`label`; take a causal language model, or name the columns in a run file"
        )
    rows = sum(1 for _ in read(source))
    settings: dict[str, Any] = {
        "model": {"name": model},
        "objective": {"name": task},
        "data": {"train": [{"path": data}], "holdout": holdout},
    }
    return Purpose(task, rows, kind, "accuracy" if task == "classification" else "loss", settings)
