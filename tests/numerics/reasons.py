"""Why a cell of the matrix is what it is, where that is not the promise of all methods."""

from typing import Any, Final

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "lora": {"rank": 4},
    "bitfit": {"add_missing": True},
    "adapter": {"bottleneck": 4},
    "compacter": {"bottleneck": 8},
    "adalora": {"rank": 4, "target_rank": 2},
    "vera": {"rank": 8},
    "prefix_tuning": {"length": 3},
    "p_tuning_v2": {"length": 3},
    "llama_adapter": {"length": 3, "layers": 2},
    "mam": {"prefix_length": 3, "bottleneck": 4},
    "unipelt": {"rank": 4, "prefix_length": 3, "bottleneck": 4},
}
"""Sizes for models of width 32, and what a method needs to exist at all."""

ANY: Final = "any"
_KEYS: Final = "keys and values besides the text's are no weight of the model"
_NO_BIAS: Final = "the linear maps have no bias that could take up the added one"
_ROWS: Final = "rows besides the text's are no weight of the model"
_PROMPT: Final = "it is the base with the prompt's tokens in its context"
_PREFIX: Final = "it is the base with the prefix's tokens in its context"
_NONLINEAR: Final = "an activation lies between the two maps, so no weight is equal to both"
_FUSED: Final = (
    "PEFT's layout has a factor for every output of a fused projection, ones for the queries"
)
_PAIRS: Final = (
    "a segment is a pair of sequences there, and cross-attention has bounds on both sides"
)

_ALL_PAIRS: Final = (
    "its own attention scores every pair of tokens in a row with every relative position, so "
    "segments side by side would cost the square of their sum, more than padding"
)

_CODES: Final = "it trains the weights themselves, and a code is a whole number without a gradient"

_OWN_SCORES: Final = (
    "its own attention scores every pair of tokens in a row, so segments side by side would cost "
    "the square of their sum, more than padding"
)

REASONS: Final[dict[tuple[str, str, str], str]] = {
    (ANY, "generation", "encoder"): "an encoder predicts no next token",
    (ANY, "packing", "bloom"): _OWN_SCORES,
    (ANY, "packing", "deberta_v2"): _ALL_PAIRS,
    (ANY, "packing", "falcon"): _OWN_SCORES,
    (ANY, "packing", "falcon_alibi"): _OWN_SCORES,
    (ANY, "packing", "seq2seq"): _PAIRS,
    ("adapter", "merge", ANY): _NONLINEAR,
    ("bitfit", "merge", "falcon"): _NO_BIAS,
    ("bitfit", "merge", "falcon_alibi"): _NO_BIAS,
    ("bitfit", "merge", "gemma"): _NO_BIAS,
    ("bitfit", "merge", "gemma2"): _NO_BIAS,
    ("bitfit", "merge", "gemma3_text"): _NO_BIAS,
    ("bitfit", "merge", "llama"): _NO_BIAS,
    ("bitfit", "merge", "mistral"): _NO_BIAS,
    ("bitfit", "merge", "mixtral"): _NO_BIAS,
    ("bitfit", "merge", "modernbert"): _NO_BIAS,
    ("bitfit", "merge", "phi3"): _NO_BIAS,
    ("bitfit", "merge", "qwen2"): _NO_BIAS,
    ("bitfit", "merge", "qwen2_moe"): _NO_BIAS,
    ("bitfit", "merge", "qwen3"): _NO_BIAS,
    ("bitfit", "merge", "qwen3_moe"): _NO_BIAS,
    ("bitfit", "merge", "t5"): _NO_BIAS,
    ("compacter", "merge", ANY): _NONLINEAR,
    ("full", "int8", ANY): _CODES,
    ("full", "nf4", ANY): _CODES,
    ("ia3", "size", "bloom"): _FUSED,
    ("ia3", "size", "falcon"): _FUSED,
    ("ia3", "size", "falcon_alibi"): _FUSED,
    ("ia3", "size", "gpt2"): _FUSED,
    ("ia3", "size", "gpt_neox"): _FUSED,
    ("ia3", "size", "modernbert"): _FUSED,
    ("ia3", "size", "phi3"): _FUSED,
    ("last_layer", "int8", ANY): _CODES,
    ("last_layer", "nf4", ANY): _CODES,
    ("llama_adapter", "merge", ANY): _KEYS,
    ("p_tuning_v2", "merge", ANY): _KEYS,
    ("p_tuning_v2", "start", ANY): "keys near zero take their share of the attention",
    ("prefix_tuning", "merge", ANY): _KEYS,
    ("prefix_tuning", "start", ANY): _PREFIX,
    ("p_tuning", "merge", ANY): _ROWS,
    ("p_tuning", "start", ANY): _PROMPT,
    ("reft", "merge", ANY): "it edits the sum between the blocks, which runs past all weights",
    ("mam", "merge", ANY): _KEYS,
    ("mam", "start", ANY): _PREFIX,
    ("unipelt", "merge", ANY): _KEYS,
    ("unipelt", "start", ANY): _PREFIX,
    ("prompt_tuning", "merge", ANY): _ROWS,
    ("prompt_tuning", "start", ANY): _PROMPT,
}
"""(method, cell, family or kind of architecture) to the mathematics by which it cannot be.

The cells are `matrix.CELLS`. What a reason means is up to the cell: `start` is then not the base,
`merge`, `attach`, `nf4` and `int8` refuse, `size` is more than what was trained, and the others do
not exist.
"""
