"""A model without weights: its shapes on the meta device, from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tunesmith.errors import ModelError
from tunesmith.models.families_encoders import ENCODERS
from tunesmith.models.families_moe import MIXTURES
from tunesmith.models.gguf import first_line
from tunesmith.models.heads import LOADERS
from tunesmith.models.loading import locate
from tunesmith.models.quiet import without_progress_bars

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from tunesmith.models.heads import Head
    from tunesmith.models.settings import ModelSettings

ModelKind = Literal["encoder", "decoder", "encoder-decoder"]


def skeleton(
    settings: ModelSettings,
    *,
    dtype: torch.dtype = torch.float32,
    head: Head | None = None,
    as_saved: bool = False,
    device: torch.device | str = "meta",
) -> PreTrainedModel:
    """Return the model that `settings` name on the meta device; no weight is read.

    Args:
        settings: a path, zoo name or Hub id; of a Hub model only the config is fetched.
        dtype: of the weights.
        head: of a classifier.
        as_saved: without a head for writing where the files hold none, as of an encoder.
        device: another one gives random weights, as training from scratch would start with.

    Raises:
        ModelError: nothing of this name, or a config that transformers does not know.
    """
    config = config_of(settings)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if as_saved and not config.is_encoder_decoder and not _writes(config):
        kind = AutoModel
    if head is not None:
        kind = LOADERS[head.kind]
        config.update(head.config())
    empty = torch.device(device).type == "meta"
    try:
        with torch.device(device), without_progress_bars():
            model: PreTrainedModel = kind.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ModelError(
            f"model.name: '{settings.name}' cannot be built: {first_line(error)}"
        ) from error
    if empty and config.model_type in MIXTURES and dtype != torch.bfloat16:
        # Where there are no data, PyTorch's grouped product takes bfloat16 only.
        model.set_experts_implementation("batched_mm")
    model.config._name_or_path = model.name_or_path = settings.name
    return model


def empty_on_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """Return a skeleton with uninitialised memory in place of weights, to hang things beside.

    Memory that nobody writes to costs address space only.
    """
    emptied: PreTrainedModel = model.to_empty(device="cpu")
    return emptied


def _writes(config: Any) -> bool:
    """Return whether the model was saved with a head that writes, or does not say."""
    saved_as: str = (config.architectures or ["ForCausalLM"])[0]
    return saved_as.endswith(("ForCausalLM", "LMHeadModel"))


def kind_of(config: Any) -> ModelKind:
    """Return what a model with this config reads and writes with."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    return "encoder" if config.model_type in ENCODERS else "decoder"


def config_of(settings: ModelSettings) -> Any:
    """Return the config of the model that `settings` name.

    Raises:
        ModelError: nothing of this name, or no config that transformers knows.
    """
    place: Path = locate(settings.name, settings, only=["config.json"])
    folder, more = (place.parent, {"gguf_file": place.name}) if place.is_file() else (place, {})
    try:
        return AutoConfig.from_pretrained(
            folder,
            trust_remote_code=settings.trust_remote_code,
            local_files_only=True,
            **more,
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"model.name: '{settings.name}' has no config that transformers knows: "
            f"{first_line(error)}"
        ) from error
