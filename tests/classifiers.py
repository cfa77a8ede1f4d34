"""Tiny random bases of classifiers on disk, and rows that they can learn in seconds."""

import json
import random
from pathlib import Path
from typing import Final

import torch
from tokenizers import processors
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from tiny import VOCAB, tiny_tokenizer

_ENCODER: Final = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.15,
}
CONFIGS: Final[dict[str, PreTrainedConfig]] = {
    "bert": BertConfig(**_ENCODER, pad_token_id=2),
    "roberta": RobertaConfig(**_ENCODER, pad_token_id=2),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=80,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.15,
        pad_token_id=2,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    ),
    "modernbert": ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=80,
        initializer_range=0.15,
        pad_token_id=2,
        attn_implementation="sdpa",
    ),
    "deberta": DebertaV2Config(**_ENCODER, pad_token_id=2, type_vocab_size=0),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    ),
}
ENCODERS: Final = ("bert", "roberta", "distilbert", "modernbert", "deberta")
DECODERS: Final = ("llama", "gpt2")


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """Bytes; encoders put a token before and after; BERT tells two texts apart."""
    tokenizer = tiny_tokenizer(None)
    if family in ENCODERS:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>",
            pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
            special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
        )
    if family == "bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def save_base(directory: Path, family: str) -> Path:
    """Save a random backbone without any head, and its tokenizer."""
    torch.manual_seed(0)
    AutoModel.from_config(CONFIGS[family]).save_pretrained(directory)
    tokenizer_for(family).save_pretrained(directory)
    return directory


def marked_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Texts of unequal length; the label is whether `#` occurs, several times where it does."""
    random_ = random.Random(seed)
    rows = []
    for number in range(count):
        letters = [random_.choice("abcdefgh") for _ in range(random_.randint(3, 14))]
        if marked := number % 2 == 1:
            for place in range(0, len(letters), 2):
                letters[place] = "#"
        rows.append({"text": "".join(letters), "label": "marked" if marked else "plain"})
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path
