"""One tiny random model of each family: every way to build a block that sites know."""

from collections.abc import Callable
from typing import Any, Final

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    DistilBertConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
)

from architecture import PAD, Architecture, Decoder, Encoder, EncoderDecoder

VOCAB: Final = 64
_COMMON: Final = {
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "initializer_range": 0.1,
}
_SIZES: Final = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_STILL: Final = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED: Final = _SIZES | {"num_key_value_heads": 2}


_WINDOWED: Final = {
    "head_dim": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_FALCON: Final = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
_ROUTED: Final = {"num_experts_per_tok": 2, "output_router_logits": False}
"""Two of four experts a token. Where two experts score almost alike, rounding decides between them,
and outputs then differ at once: with these weights and the tokens of the tests the second and the
third are always far enough apart (see tests/models/test_sites_moe.py)."""


def _maker(
    auto: Any, config: type[PreTrainedConfig], **sizes: Any
) -> Callable[[], PreTrainedModel]:
    """Return what builds the model in eval mode, float32, without dropout."""

    def make() -> PreTrainedModel:
        return auto.from_config(config(**_COMMON | sizes)).eval()

    return make


def _decoder(config: type[PreTrainedConfig], **sizes: Any) -> Decoder:
    return Decoder(_maker(AutoModelForCausalLM, config, **sizes))


def _encoder(config: type[PreTrainedConfig], **sizes: Any) -> Encoder:
    return Encoder(_maker(AutoModelForMaskedLM, config, **sizes))


_T5: Final = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
    "dropout_rate": 0.0,
}
_BART: Final = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "decoder_start_token_id": PAD,
    "forced_eos_token_id": None,
    "init_std": 0.1,
    "dropout": 0.0,
}


def _seq2seq(config: type[PreTrainedConfig], **sizes: Any) -> EncoderDecoder:
    return EncoderDecoder(_maker(AutoModelForSeq2SeqLM, config, **sizes))


FAMILIES: Final[dict[str, Architecture]] = {
    "llama": _decoder(LlamaConfig, **_GROUPED),
    "qwen3": _decoder(Qwen3Config, **_GROUPED, head_dim=16),
    "gemma": _decoder(GemmaConfig, **_GROUPED | {"num_key_value_heads": 1}, head_dim=16),
    "phi3": _decoder(Phi3Config, **_GROUPED, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt2": _decoder(
        GPT2Config,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "opt": _decoder(
        OPTConfig,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
    ),
    "gpt_neox": _decoder(GPTNeoXConfig, **_SIZES),
    "falcon": _decoder(FalconConfig, **_FALCON, multi_query=True),
    "falcon_alibi": _decoder(
        FalconConfig,
        **_FALCON,
        new_decoder_architecture=True,
        num_kv_heads=2,
        alibi=True,
    ),
    "bloom": _decoder(
        BloomConfig,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "mistral": _decoder(MistralConfig, **_GROUPED, sliding_window=4),
    "qwen2": _decoder(Qwen2Config, **_GROUPED),
    "gemma2": _decoder(Gemma2Config, **_GROUPED, **_WINDOWED),
    "gemma3_text": _decoder(Gemma3TextConfig, **_GROUPED, **_WINDOWED),
    "mixtral": _decoder(MixtralConfig, **_GROUPED, **_ROUTED, num_local_experts=4),
    "qwen2_moe": _decoder(
        Qwen2MoeConfig,
        **_GROUPED,
        **_ROUTED,
        num_experts=4,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": _decoder(
        Qwen3MoeConfig, **_GROUPED, **_ROUTED, num_experts=4, moe_intermediate_size=24, head_dim=16
    ),
    "t5": _seq2seq(T5Config, **_T5, feed_forward_proj="gated-gelu"),
    "bart": _seq2seq(BartConfig, **_BART),
    "bert": _encoder(BertConfig, **_SIZES, **_STILL),
    "roberta": _encoder(RobertaConfig, **_SIZES, **_STILL),
    "distilbert": _encoder(
        DistilBertConfig,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "modernbert": _encoder(
        ModernBertConfig,
        **_SIZES,
        global_attn_every_n_layers=2,
        local_attention=4,
        cls_token_id=0,
        sep_token_id=1,
    ),
    "deberta_v2": _encoder(
        DebertaV2Config,
        **_SIZES,
        **_STILL,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    ),
}
"""The architectures of the matrix: grouped queries, norms of heads, one key head, fused
projections of three layouts, Conv1D, biases, learned and rotary positions, parallel branches."""

DECODERS: Final = {name: arch.make for name, arch in FAMILIES.items() if arch.kind == "decoder"}
"""What builds each model that reads and writes one sequence."""

tiny_gemma2: Final = _maker(AutoModelForCausalLM, Gemma2Config, **_GROUPED, head_dim=16)
"""Caps its attention scores, so it runs eager attention."""
tiny_gptj: Final = _maker(
    AutoModelForCausalLM, GPTJConfig, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
)
"""Has attention code of its own that nothing can be added to."""
