"""One tiny random model of each family: every way to build a block that sites know."""

from collections.abc import Callable
from typing import Any, Final

from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCAB: Final = 64
_COMMON: Final = {
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
    "initializer_range": 0.1,
}
_SIZES: Final = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED: Final = _SIZES | {"num_key_value_heads": 2}


def _family(config: type[PreTrainedConfig], **sizes: Any) -> Callable[[], PreTrainedModel]:
    """Return what builds the model in eval mode, float32, without dropout."""

    def make() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config(**_COMMON | sizes)).eval()

    return make


FAMILIES: Final[dict[str, Callable[[], PreTrainedModel]]] = {
    "llama": _family(LlamaConfig, **_GROUPED),
    "qwen3": _family(Qwen3Config, **_GROUPED, head_dim=16),
    "gemma": _family(GemmaConfig, **_GROUPED | {"num_key_value_heads": 1}, head_dim=16),
    "phi3": _family(Phi3Config, **_GROUPED, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt2": _family(
        GPT2Config,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "opt": _family(
        OPTConfig,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
    ),
    "gpt_neox": _family(GPTNeoXConfig, **_SIZES),
}
"""The architectures of the matrix: grouped queries, norms of heads, one key head, fused
projections of three layouts, Conv1D, biases, learned and rotary positions, parallel branches."""

tiny_gemma2: Final = _family(Gemma2Config, **_GROUPED, head_dim=16)
"""Caps its attention scores, so it runs eager attention."""
tiny_bloom: Final = _family(BloomConfig, hidden_size=32, n_layer=2, n_head=4)
"""Has attention code of its own."""
