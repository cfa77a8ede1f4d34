"""Loading a saved adapter onto its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.methods.tuned import TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_adapter(
    model: PreTrainedModel | TunedModel,
    directory: str | Path,
    *,
    name: str | None = None,
    check_base: bool = True,
    trainable: bool = True,
) -> TunedModel:
    """Load an adapter that Tunesmith or PEFT saved onto `model`.

    Args:
        model: its base model, or a tuned one, which then has this adapter besides.
        directory: where it was saved.
        name: name to give it; None keeps the name it was saved under ("default" for PEFT's).
        check_base: refuse an adapter that was made on a base of another name. Sizes are checked in
            any case.
        trainable: whether it goes on training; False freezes it.

    Raises:
        AdapterError: a file is damaged, or the adapter does not fit this base model; the model is
            then as it was before.
        MethodError: an adapter of this name is attached already, or the name cannot name one.
    """
    tuned = model if isinstance(model, TunedModel) else TunedModel(model)
    tuned.load_adapter(name, directory, check_base=check_base, trainable=trainable)
    return tuned
