"""Loading a model and its tokenizer by path, zoo name, Hub id or GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.errors import ModelError
from tunesmith.models.chat import prepare_tokenizer
from tunesmith.models.gguf import first_line, load_gguf, load_gguf_tokenizer
from tunesmith.models.hub import download
from tunesmith.models.precision import DTYPES, best_dtype
from tunesmith.models.quiet import without_progress_bars
from tunesmith.models.settings import ModelSettings
from tunesmith.models.zoo import MODELS, near, zoo_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Loaded(NamedTuple):
    """A model in eval mode, and the tokenizer that belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def load_model(
    name_or_settings: str | ModelSettings,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Return a causal language model on `device`, and its tokenizer.

    Args:
        name_or_settings: a path, zoo name or Hub id (looked up in this order), or settings.
        device: where the weights go.
        dtype: of the weights; by default what the settings say, whose `auto` is `best_dtype`.

    Raises:
        ModelError: nothing of this name, damaged or incomplete files, or pickled weights only.
        SetupError: a zoo model that is not cached and cannot be fetched.
    """
    settings = _as_settings(name_or_settings)
    dtype = dtype or _dtype(settings, device)
    place = locate(settings.name, settings)
    if place.is_file():
        model = load_gguf(place, dtype=dtype).to(device)
    else:
        model = _load_directory(place, settings, device=device, dtype=dtype)
    # Adapters record the base under the name that loads it again, not a folder of the cache.
    model.config._name_or_path = model.name_or_path = settings.name
    if settings.tokenizer is not None:
        return Loaded(model.eval(), load_tokenizer(settings))
    return Loaded(model.eval(), _tokenizer_at(place, settings))


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerFast:
    """Return the tokenizer, with a pad token and a chat template (see `prepare_tokenizer`).

    Raises:
        ModelError: there is none, or it is damaged.
    """
    return _tokenizer_at(locate(settings.tokenizer or settings.name, settings), settings)


def _tokenizer_at(place: Path, settings: ModelSettings) -> PreTrainedTokenizerFast:
    tokenizer = load_gguf_tokenizer(place) if place.is_file() else _load_tokenizer(place, settings)
    prepare_tokenizer(tokenizer, settings)
    return tokenizer


def locate(name: str, settings: ModelSettings) -> Path:
    """Return the directory or GGUF file that `name` stands for: a path, zoo name or Hub id.

    Raises:
        ModelError: nothing of this name.
        SetupError: a zoo model that is not cached and cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.is_file():
        raise ModelError(
            f"model.name: '{name}' is a file and not a model directory or a .gguf file"
        )
    if name in MODELS:
        return zoo_model(name)
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf"
    if looks_like_path or name.count("/") > 1:
        raise ModelError(f"model.name: there is no file or directory '{name}'")
    return download(name, settings, otherwise=near(name, MODELS))


def _as_settings(name_or_settings: str | ModelSettings) -> ModelSettings:
    if isinstance(name_or_settings, ModelSettings):
        return name_or_settings
    return ModelSettings(name=name_or_settings)


def _dtype(settings: ModelSettings, device: torch.device | str) -> torch.dtype:
    return best_dtype(device) if settings.dtype == "auto" else DTYPES[settings.dtype]


def _load_directory(
    directory: Path, settings: ModelSettings, *, device: torch.device | str, dtype: torch.dtype
) -> PreTrainedModel:
    _check_directory(directory, settings)
    on_cpu = torch.device(device).type == "cpu"
    try:
        with without_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation="eager" if settings.attention == "eager" else None,
                device_map=None if on_cpu else {"": device},
                trust_remote_code=settings.trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"model.name: '{settings.name}' cannot be loaded as a causal language model: "
            f"{first_line(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model.name: '{settings.name}' has no weights for {len(missing)} parameters "
            f"({missing[0]}, ...) of {type(model).__name__}, which would start random; it is "
            "incomplete or no causal language model"
        )
    return model


def _check_directory(directory: Path, settings: ModelSettings) -> None:
    """Refuse what is not a whole model directory before transformers tries every way to read it."""
    name = settings.name
    config = directory / "config.json"
    if not config.is_file():
        raise ModelError(f"model.name: '{name}' has no config.json, so {_what_it_is(directory)}")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(
            f"model.name: '{name}' has a config.json that is not JSON ({error})"
        ) from error
    shards = sorted(directory.glob("*.safetensors"))
    if not shards and any(file for kind in _PICKLES for file in directory.glob(kind)):
        raise ModelError(
            f"model.name: '{name}' has only pickled weights, which can run code when read; convert "
            "them to safetensors, or take a revision that has them"
        )
    if not shards:
        raise ModelError(f"model.name: '{name}' has no *.safetensors file, so no weights")
    for shard in shards:
        _check_shard(shard)


def _what_it_is(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return "it is an adapter and no model; load its base and then tunesmith.load_adapter"
    if files := sorted(directory.glob("*.gguf")):
        return f"name the GGUF file itself: {files[0]}"
    return "it is not a model directory"


def _check_shard(shard: Path) -> None:
    try:
        with safe_open(shard, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"model.name: {shard} is damaged ({first_line(error)}); restore or download it again"
        ) from error


def _load_tokenizer(directory: Path, settings: ModelSettings) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    # The tokenizers library raises nothing narrower for a damaged file.
    except Exception as error:
        raise ModelError(
            f"model.tokenizer: '{settings.tokenizer or settings.name}' has no tokenizer that "
            f"transformers can read ({first_line(error)})"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.tokenizer: '{settings.tokenizer or settings.name}' has only a slow tokenizer "
            f"({type(tokenizer).__name__}); one with a tokenizer.json is needed"
        )
    return tokenizer
