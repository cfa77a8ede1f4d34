"""The architecture table: where each family keeps its projections, branch outputs and norms.

Everything is a path inside one block. What is listed may be absent from a given model (a gate, an
optional norm), but nothing with parameters may be there that is not listed: `find_sites` refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from tunesmith.models.families_encoders import ENCODERS
from tunesmith.models.families_moe import MIXTURES
from tunesmith.models.families_seq2seq import SEQ2SEQ
from tunesmith.models.family import GATE_UP, QKV, Columns, Family, Fused, equal_parts, under


def _grouped(width: int, heads: int, kv_heads: int) -> tuple[Columns, ...]:
    """Return the columns of [all q | all k | all v] with fewer key and value heads than queries."""
    head = width // (heads + 2 * kv_heads)
    q, k = heads * head, (heads + kv_heads) * head
    return ((0, q),), ((q, k),), ((k, width),)


def _interleaved(width: int, groups: int, queries: int) -> tuple[Columns, ...]:
    """Return the columns of `groups` times [`queries` heads of q | one k | one v]."""
    head = width // (groups * (queries + 2))
    starts = [group * (queries + 2) * head for group in range(groups)]
    q = tuple((start, start + queries * head) for start in starts)
    k = tuple((stop, stop + head) for _, stop in q)
    return q, k, tuple((stop, stop + head) for _, stop in k)


def by_kv_heads(config: Any, width: int) -> tuple[Columns, ...]:
    """Phi-3, GLM: [q | k | v], each head after head."""
    return _grouped(width, config.num_attention_heads, config.num_key_value_heads)


def by_head(config: Any, width: int) -> tuple[Columns, ...]:
    """GPT-NeoX, BLOOM: for every head its q, k and v."""
    return _interleaved(width, config.num_attention_heads, 1)


def _gpt_bigcode(config: Any, width: int) -> tuple[Columns, ...]:
    if config.multi_query:
        return _grouped(width, config.num_attention_heads, 1)
    return by_head(config, width)


def _falcon(config: Any, width: int) -> tuple[Columns, ...]:
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        return _interleaved(width, groups, config.num_attention_heads // groups)
    return _gpt_bigcode(config, width)


_QKVO: Final = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_HEAD_NORMS: Final = ("self_attn.q_norm", "self_attn.k_norm")
_BRANCH_NORMS: Final = ("post_attention_layernorm", "post_feedforward_layernorm")

_LLAMA: Final = Family(
    blocks="layers",
    linears=under("self_attn", **_QKVO)
    | under("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    attention_out="self_attn.o_proj",
    mlp_out="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm", *_HEAD_NORMS),
    final_norm="norm",
)
_OLMO2: Final = replace(
    _LLAMA,
    attention_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    norms=(*_BRANCH_NORMS, *_HEAD_NORMS),
)
_GEMMA2: Final = replace(
    _OLMO2, norms=("input_layernorm", "pre_feedforward_layernorm", *_BRANCH_NORMS, *_HEAD_NORMS)
)
_STABLELM: Final = replace(
    _LLAMA,
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_layernorm",
        "self_attn.k_layernorm",
    ),
)
_PHI3: Final = replace(
    _LLAMA,
    linears={"attention.o": "self_attn.o_proj", "mlp.down": "mlp.down_proj"},
    fused={
        "self_attn.qkv_proj": Fused(QKV, by_kv_heads),
        "mlp.gate_up_proj": Fused(GATE_UP, equal_parts(2)),
    },
)
_GLM4: Final = replace(
    _LLAMA,
    linears=under("self_attn", **_QKVO) | under("mlp", down="down_proj"),
    fused={"mlp.gate_up_proj": Fused(GATE_UP, equal_parts(2))},
    attention_out="post_self_attn_layernorm",
    mlp_out="post_mlp_layernorm",
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "post_self_attn_layernorm",
        "post_mlp_layernorm",
    ),
)
_PHI: Final = replace(
    _STABLELM,
    linears=under("self_attn", **_QKVO | {"o": "dense"}) | under("mlp", up="fc1", down="fc2"),
    attention_out="self_attn.dense",
    mlp_out="mlp.fc2",
    final_norm="final_layernorm",
)
_STARCODER2: Final = replace(
    _LLAMA,
    linears=under("self_attn", **_QKVO) | under("mlp", up="c_fc", down="c_proj"),
    mlp_out="mlp.c_proj",
)
_GPT2: Final = Family(
    blocks="h",
    linears=under("attn", o="c_proj") | under("mlp", up="c_fc", down="c_proj"),
    fused={"attn.c_attn": Fused(QKV, equal_parts(3))},
    attention_out="attn.c_proj",
    mlp_out="mlp.c_proj",
    norms=("ln_1", "ln_2"),
    final_norm="ln_f",
)
_GPT_NEO: Final = replace(
    _GPT2,
    linears=under("attn.attention", **_QKVO | {"o": "out_proj"})
    | under("mlp", up="c_fc", down="c_proj"),
    fused={},
    attention_out="attn.attention.out_proj",
)
_GPTJ: Final = replace(
    _GPT_NEO,
    linears=under("attn", **_QKVO | {"o": "out_proj"}) | under("mlp", up="fc_in", down="fc_out"),
    attention_out="attn.out_proj",
    mlp_out="mlp.fc_out",
)
_GPT_NEOX: Final = Family(
    blocks="layers",
    linears=under("attention", o="dense") | under("mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    fused={"attention.query_key_value": Fused(QKV, by_head)},
    attention_out="attention.dense",
    mlp_out="mlp.dense_4h_to_h",
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="final_layer_norm",
)
_BLOOM: Final = replace(
    _GPT_NEOX,
    blocks="h",
    linears=under("self_attention", o="dense")
    | under("mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    fused={"self_attention.query_key_value": Fused(QKV, by_head)},
    attention_out="self_attention.dense",
    final_norm="ln_f",
)
_FALCON: Final = replace(
    _BLOOM,
    fused={"self_attention.query_key_value": Fused(QKV, _falcon)},
    norms=("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp"),
)
_MPT: Final = replace(
    _GPT2,
    blocks="blocks",
    linears=under("attn", o="out_proj") | under("ffn", up="up_proj", down="down_proj"),
    fused={"attn.Wqkv": Fused(QKV, equal_parts(3))},
    attention_out="attn.out_proj",
    mlp_out="ffn.down_proj",
    norms=("norm_1", "norm_2"),
    final_norm="norm_f",
)
_OPT: Final = Family(
    blocks="decoder.layers",
    linears=under("self_attn", **_QKVO | {"o": "out_proj"}) | under("", up="fc1", down="fc2"),
    attention_out="self_attn.out_proj",
    mlp_out="fc2",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="decoder.final_layer_norm",
)

# fmt: off
_LLAMA_LIKE: Final = (
    "arcee", "cohere", "cohere2", "ernie4_5", "gemma", "granite", "helium", "llama", "ministral",
    "mistral", "olmo", "qwen2", "qwen3", "smollm3",
)
# fmt: on
FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    dict.fromkeys(_LLAMA_LIKE, _LLAMA)
    | dict.fromkeys(("exaone4", "olmo2", "olmo3"), _OLMO2)
    | dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2)
    | dict(ENCODERS)
    | dict(SEQ2SEQ)
    | dict(MIXTURES)
    | {
        "bloom": _BLOOM,
        "falcon": _FALCON,
        "glm4": _GLM4,
        "gpt2": _GPT2,
        "gpt_bigcode": replace(_GPT2, fused={"attn.c_attn": Fused(QKV, _gpt_bigcode)}),
        "gpt_neo": _GPT_NEO,
        "gpt_neox": _GPT_NEOX,
        "gptj": _GPTJ,
        "mpt": _MPT,
        "opt": _OPT,
        "phi": _PHI,
        "phi3": _PHI3,
        "stablelm": _STABLELM,
        "starcoder2": _STARCODER2,
    }
)
"""Model type (`config.json`) to family."""


def first_position(config: Any) -> int:
    """Return the position of a text's first token: 0, or RoBERTa's `pad_token_id` + 1."""
    family = FAMILIES.get(config.model_type)
    if family is None or not family.positions_after_padding:
        return 0
    first: int = config.pad_token_id + 1
    return first
