"""Reading GGUF files through transformers, and mending what that way loses."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tunesmith.errors import ModelError

logger = logging.getLogger(__name__)

# Of what llama.cpp calls the ways to split a text (src/llama-vocab.cpp): each digit alone and then
# as GPT-2, which is SmolLM's, StarCoder's and Granite's (refact) ...
_DIGITS_APART: Final = {"codeshell", "command-r", "exaone", "refact", "smollm", "starcoder"}
# ... and plainly as GPT-2.
_AS_GPT2: Final = {"gpt-2", "jais", "mpt", "olmo", "phi-2", "trillion"}

# Types of header values, of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
_STRING: Final = 8
_ARRAY: Final = 9
_NUMBER_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def load_gguf(path: Path, *, dtype: torch.dtype) -> Any:
    """Return the causal language model of a GGUF file, dequantised to `dtype`.

    Raises:
        ModelError: not a GGUF file, or an architecture that transformers does not read.
    """
    fields = read_fields(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            # Newer versions would keep the weights packed where a kernel for them is installed.
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise ModelError(
            f"model.name: transformers cannot read '{path}' (architecture "
            f"'{fields.get('general.architecture')}'): {first_line(error)}"
        ) from error
    # The weights are plain now, but the leftovers of loading forbid saving them.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    return model


def load_gguf_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a GGUF file.

    Raises:
        ModelError: not a GGUF file, or a tokenizer that transformers does not read.
    """
    fields = read_fields(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    # The tokenizers library raises nothing narrower for what it cannot build.
    except Exception as error:
        raise ModelError(
            f"model.name: transformers cannot read the tokenizer of '{path}' "
            f"('{fields.get('tokenizer.ggml.model')}'): {first_line(error)}"
        ) from error
    splits = fields.get("tokenizer.ggml.pre")
    if splits in _DIGITS_APART:
        # transformers drops the step that splits digits, and with it how blanks before them split.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    elif splits not in {None, *_AS_GPT2} and _splits_as_gpt2(tokenizer):
        logger.warning(
            "model.name: '%s' was made to split texts as '%s' does, and transformers splits them "
            "as GPT-2 does, so some become other tokens than the model learned from; name the "
            "original tokenizer by model.tokenizer",
            path,
            splits,
        )
    return tokenizer


def _splits_as_gpt2(tokenizer: Any) -> bool:
    """Return whether nothing but GPT-2's own step splits texts: what transformers falls back to."""
    return isinstance(tokenizer.backend_tokenizer.pre_tokenizer, ByteLevel)


def read_fields(path: Path) -> dict[str, str]:
    """Return the text fields of a GGUF file's header (architecture, tokenizer, chat template).

    Raises:
        ModelError: not a GGUF file (version 2 or 3), or cut short.
    """
    with path.open("rb") as file:
        try:
            magic, version, _tensors, count = _unpack("<4sIQQ", file)
            if magic != b"GGUF" or version not in (2, 3):
                raise ModelError(f"model.name: '{path}' is not a GGUF file of version 2 or 3")
            named = [
                (_value(_STRING, file), _value(_unpack("<I", file)[0], file)) for _ in range(count)
            ]
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise ModelError(
                f"model.name: '{path}' is cut short or damaged; download it again"
            ) from error
    return {str(name): value for name, value in named if isinstance(value, str)}


def _value(kind: int, file: BinaryIO) -> str | None:
    """Read one value and return it if it is text; numbers and arrays are stepped over."""
    if kind == _STRING:
        (length,) = _unpack("<Q", file)
        return file.read(length).decode("utf-8")
    if kind == _ARRAY:
        inner, length = _unpack("<IQ", file)
        if inner in _NUMBER_BYTES:
            file.seek(length * _NUMBER_BYTES[inner], 1)
            return None
        for _ in range(length):
            _value(inner, file)
        return None
    file.seek(_NUMBER_BYTES[kind], 1)
    return None


def _unpack(layout: str, file: BinaryIO) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: what a one-sentence message can hold."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
