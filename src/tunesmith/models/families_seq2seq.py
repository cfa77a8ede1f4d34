"""The architecture table of encoder-decoders: a decoder's family, which names its encoder's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from tunesmith.models.family import Family

_BIAS: Final = "layer.0.SelfAttention.relative_attention_bias"
"""Position biases, of the first block only in T5 and mT5 and of every block in UMT5."""


def _t5(stack: str, *, feed_forward: str) -> Family:
    """Return one stack of T5: a plain feed-forward has `wi`, a gated one `wi_0` and `wi_1`."""
    dense = f"{feed_forward}.DenseReluDense"
    return Family(
        blocks=f"{stack}.block",
        linears={f"attention.{leaf}": f"layer.0.SelfAttention.{leaf}" for leaf in "qkvo"}
        | {"mlp.gate": f"{dense}.wi_0", "mlp.up": f"{dense}.wi_1", "mlp.down": f"{dense}.wo"},
        alternatives={"mlp.up": f"{dense}.wi"},
        attention_out="layer.0.SelfAttention.o",
        mlp_out=f"{dense}.wo",
        norms=("layer.0.layer_norm", f"{feed_forward}.layer_norm"),
        final_norm=f"{stack}.final_layer_norm",
        others=(_BIAS,),
    )


_T5_ENCODER: Final = replace(_t5("encoder", feed_forward="layer.1"), stack="encoder")
_T5_DECODER: Final = _t5("decoder", feed_forward="layer.2")
_T5: Final = replace(
    _T5_DECODER,
    linears=dict(_T5_DECODER.linears)
    | {f"cross.{leaf}": f"layer.1.EncDecAttention.{leaf}" for leaf in "qkvo"},
    cross_out="layer.1.EncDecAttention.o",
    norms=("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
    encoder=_T5_ENCODER,
)

_LEAVES: Final = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
_BART_ENCODER: Final = Family(
    blocks="encoder.layers",
    linears={f"attention.{site}": f"self_attn.{leaf}" for site, leaf in _LEAVES.items()}
    | {"mlp.up": "fc1", "mlp.down": "fc2"},
    attention_out="self_attn.out_proj",
    mlp_out="fc2",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="encoder.layer_norm",
    stack="encoder",
)
_BART: Final = replace(
    _BART_ENCODER,
    blocks="decoder.layers",
    linears=dict(_BART_ENCODER.linears)
    | {f"cross.{site}": f"encoder_attn.{leaf}" for site, leaf in _LEAVES.items()},
    cross_out="encoder_attn.out_proj",
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    final_norm="decoder.layer_norm",
    stack="decoder",
    encoder=_BART_ENCODER,
)

SEQ2SEQ: Final[Mapping[str, Family]] = MappingProxyType(
    dict.fromkeys(("mt5", "t5", "umt5"), _T5)
    | dict.fromkeys(("bart", "marian", "mbart", "pegasus"), _BART)
)
"""Model type (`config.json`) to the decoder's family. Only mBART and Pegasus have final norms
among BART's kind."""
