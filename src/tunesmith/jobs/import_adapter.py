"""From an adapter that AdapterHub saved to one of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from tunesmith.errors import AdapterError, ModelError
from tunesmith.jobs.proofs import require
from tunesmith.methods.adapterhub import load_adapterhub
from tunesmith.methods.storage import load_adapter
from tunesmith.models.gguf import first_line, load_gguf
from tunesmith.models.loading import locate
from tunesmith.models.quiet import without_progress_bars
from tunesmith.models.settings import ModelSettings
from tunesmith.models.skeleton import config_of, kind_of
from tunesmith.types import Proof

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Method

PROBE: Final = (2, 16)
"""Rows and tokens that the written adapter is compared on."""


@dataclass(frozen=True)
class Imported:
    """What was read, and what was checked of what was written."""

    method: Method
    parameters: int
    proofs: list[Proof]


def import_adapter(
    directory: str | Path, *, base: str, out: str | Path, name: str | None = None
) -> Imported:
    """Write an adapter that AdapterHub saved as one that `load_adapter` reads.

    Args:
        directory: what AdapterHub's `save_adapter` wrote.
        base: the model it was made on: a path, zoo name or Hub id.
        out: the directory to write; must not exist or be empty.
        name: name of the adapter; None keeps its own.

    Raises:
        AdapterError: the adapter computes what no method here does, does not fit `base`, or `out`
            is not empty.
        ModelError: there is no such model, or none that adapters attach to.
        ProofError: what was written reads back as something else.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(f"{target} exists and is not empty; choose another directory")
    model = _base(base)
    tuned = load_adapterhub(model, directory, name=name)
    tuned.save(target)
    ids = torch.randint(
        model.config.get_text_config().vocab_size,
        PROBE,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        expected = tuned.model(ids).logits
        parameters = sum(p.numel() for p in tuned.trainable().values())
        method = tuned.parts[0].method
        found = load_adapter(tuned.detach(), target).model(ids).logits
    same = torch.equal(found, expected)
    detail = "logits are equal, bit for bit" if same else "logits differ"
    proofs = require([Proof("written adapter loads equal", same, detail)])
    return Imported(method, parameters, proofs)


def _base(name: str) -> PreTrainedModel:
    """Return the base in float32, with the head that it was trained with first."""
    settings = ModelSettings(name=name)
    kind = kind_of(config_of(settings))
    if kind == "encoder-decoder":
        raise ModelError(
            f"--base: '{name}' is an encoder-decoder, and AdapterHub's adapters are read for "
            "encoders and decoders only"
        )
    place = locate(name, settings)
    if place.is_file():
        model = load_gguf(place, dtype=torch.float32)
    else:
        auto = AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM
        try:
            with without_progress_bars():
                model = auto.from_pretrained(place, dtype=torch.float32)
        except (ValueError, OSError, SafetensorError) as error:
            raise ModelError(f"--base: '{name}' cannot be loaded: {first_line(error)}") from error
    # Adapters record the base under the name that loads it again, not a folder of the cache.
    model.config._name_or_path = model.name_or_path = name
    return model.eval()
