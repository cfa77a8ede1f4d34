"""Loading a model and its tokenizer by path, zoo name, Hub id or GGUF file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tunesmith.errors import ModelError
from tunesmith.models.chat import prepare_tokenizer
from tunesmith.models.encoder_decoder import holds_encoder_decoder
from tunesmith.models.gguf import first_line, load_gguf, load_gguf_tokenizer
from tunesmith.models.heads import LOADERS, head_paths, start_head
from tunesmith.models.hub import download
from tunesmith.models.precision import DTYPES, best_dtype
from tunesmith.models.quantize import quantise, require_quantiser
from tunesmith.models.quiet import without_load_report, without_progress_bars
from tunesmith.models.settings import ModelSettings
from tunesmith.models.zoo import MODELS, near, zoo_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.models.heads import Head

logger = logging.getLogger(__name__)

_OF_TOKENIZERS: Final = ("*.json", "*.model", "*.txt", "*.jinja")
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
    head: Head | None = None,
) -> Loaded:
    """Return a language model, or one with `head`, on `device`, and its tokenizer.

    A directory whose config.json says so holds an encoder-decoder, any other a causal model.

    Args:
        name_or_settings: a path, zoo name or Hub id (looked up in this order), or settings.
        device: where the weights go.
        dtype: of the weights; by default what the settings say, whose `auto` is `best_dtype`.
        head: of a classifier; where the files hold no such head, it starts from its seed.

    Raises:
        ModelError: nothing of this name, damaged or incomplete files, or pickled weights only.
        SetupError: a zoo model that is not cached and cannot be fetched, or weights to be
            quantised without bitsandbytes or on a device that it does not know.
    """
    settings = _as_settings(name_or_settings)
    if settings.adapter is not None:
        raise ModelError(
            f"model.adapter: {settings.adapter} is merged in by runs; load the base without it and "
            "then tunesmith.load_adapter"
        )
    dtype = dtype or _dtype(settings, device)
    require_quantiser(settings, device)
    place = locate(settings.name, settings)
    quantised = settings.quantize != "none"
    first = "cpu" if quantised else device
    if place.is_file() and head is not None:
        raise ModelError(
            f"model.name: '{settings.name}' is a GGUF file, which holds a causal language model; "
            "save it as a model directory to give it a classification head"
        )
    if place.is_file():
        model = load_gguf(place, dtype=dtype).to(first)
    else:
        model = _load_directory(place, settings, device=first, dtype=dtype, head=head)
    if quantised:
        quantise(model, settings, device=device)
    # Adapters record the base under the name that loads it again, not a folder of the cache.
    model.config._name_or_path = model.name_or_path = settings.name
    chats = head is None
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings, chats=chats)
    else:
        tokenizer = _tokenizer_at(place, settings, chats=chats)
    if head is not None:
        # transformers' own forward finds the padding of a decoder by it.
        model.config.pad_token_id = tokenizer.pad_token_id
    return Loaded(model.eval(), tokenizer)


def load_tokenizer(settings: ModelSettings, *, chats: bool = True) -> PreTrainedTokenizerFast:
    """Return the tokenizer, with a pad token and, if it `chats`, a template.

    See `prepare_tokenizer`.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    other = settings.tokenizer
    if other is None or other == settings.name:
        place = locate(settings.name, settings)
    else:
        # The revision is the model's, and so are weights.
        its = settings.model_copy(update={"revision": None})
        place = locate(other, its, only=_OF_TOKENIZERS, key="model.tokenizer")
    return _tokenizer_at(place, settings, chats=chats)


def _tokenizer_at(
    place: Path, settings: ModelSettings, *, chats: bool = True
) -> PreTrainedTokenizerFast:
    tokenizer = load_gguf_tokenizer(place) if place.is_file() else _load_tokenizer(place, settings)
    bare = tokenizer.chat_template is None and settings.chat_template is None
    reads_apart = bare and chats and is_encoder_decoder(settings)
    prepare_tokenizer(tokenizer, settings, chats=chats, reads_apart=reads_apart)
    return tokenizer


def is_encoder_decoder(settings: ModelSettings) -> bool:
    """Return whether the model that `settings` name reads with one stack and writes with another.

    Raises:
        ModelError: nothing of this name.
        SetupError: a zoo model that is not cached and cannot be fetched.
    """
    return holds_encoder_decoder(locate(settings.name, settings))


def locate(
    name: str,
    settings: ModelSettings,
    *,
    only: Sequence[str] | None = None,
    key: str = "model.name",
) -> Path:
    """Return the directory or GGUF file that `name` stands for: a path, zoo name or Hub id.

    Args:
        name: what to look up.
        settings: for the Hub's revision.
        only: names of the files to fetch from the Hub; None is all that a model needs.
        key: the setting that says `name`.

    Raises:
        ModelError: nothing of this name.
        SetupError: a zoo model that is not cached and cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.is_file():
        raise ModelError(f"{key}: '{name}' is a file and not a model directory or a .gguf file")
    if name in MODELS:
        return zoo_model(name)
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf"
    if looks_like_path or name.count("/") > 1:
        raise ModelError(f"{key}: there is no file or directory '{name}'")
    return download(name, settings, otherwise=near(name, MODELS), only=only, key=key)


def _as_settings(name_or_settings: str | ModelSettings) -> ModelSettings:
    if isinstance(name_or_settings, ModelSettings):
        return name_or_settings
    return ModelSettings(name=name_or_settings)


def _dtype(settings: ModelSettings, device: torch.device | str) -> torch.dtype:
    return best_dtype(device) if settings.dtype == "auto" else DTYPES[settings.dtype]


def _load_directory(
    directory: Path,
    settings: ModelSettings,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head: Head | None = None,
) -> PreTrainedModel:
    _check_directory(directory, settings)
    on_cpu = torch.device(device).type == "cpu"
    if head is not None and holds_encoder_decoder(directory):
        raise ModelError(
            f"model.name: '{settings.name}' is an encoder-decoder, and classification heads are "
            "for encoders and decoders; use one, or train it to write the label (objective sft)"
        )
    # A saved head for other classes is left out, and starts anew.
    shape: dict[str, Any] = head.config() | {"ignore_mismatched_sizes": True} if head else {}
    try:
        with without_progress_bars(), without_load_report() if head else nullcontext():
            model, info = _loader(directory, head).from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation="eager" if settings.attention == "eager" else None,
                device_map=None if on_cpu else {"": device},
                trust_remote_code=settings.trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **shape,
            )
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"model.name: '{settings.name}' cannot be loaded {_as_what(directory, head)}: "
            f"{first_line(error)}"
        ) from error
    missing = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if head is not None:
        missing -= _start_head(model, missing, head)
    if missing:
        raise ModelError(
            f"model.name: '{settings.name}' has no weights for {len(missing)} parameters "
            f"({min(missing)}, ...) of {type(model).__name__}, which would start random; it is "
            f"incomplete or cannot be loaded {_as_what(directory, head)}"
        )
    return model


def _loader(directory: Path, head: Head | None) -> Any:
    """Return the class that loads the model in `directory` with this head."""
    if head is not None:
        return LOADERS[head.kind]
    return AutoModelForSeq2SeqLM if holds_encoder_decoder(directory) else AutoModelForCausalLM


def _as_what(directory: Path, head: Head | None) -> str:
    if head is not None:
        return f"with a {head.kind} head"
    apart = holds_encoder_decoder(directory)
    return "as an encoder-decoder" if apart else "as a causal language model"


def _start_head(model: PreTrainedModel, missing: set[str], head: Head) -> set[str]:
    """Start those of the `missing` weights that are the head's, and return their names."""
    parents = tuple(f"{path}." for path in head_paths(model))
    new = {name for name in missing if name.startswith(parents)}
    start_head(model, new, head.seed)
    if new:
        logger.debug("the head starts new: %s", ", ".join(sorted(new)))
    return new


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
