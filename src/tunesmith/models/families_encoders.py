"""The encoders' part of the architecture table.

All but ModernBERT normalise after each branch has joined the residual, so their last block ends
with its own norm and no final one follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from tunesmith.models.family import GATE_UP, QKV, Family, Fused, equal_parts, under

_BERT: Final = Family(
    blocks="encoder.layer",
    linears=under("attention.self", q="query", k="key", v="value")
    | under("attention.output", o="dense")
    | under("", up="intermediate.dense", down="output.dense"),
    attention_out="attention.output.dense",
    mlp_out="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    final_norm=None,
    stack="encoder",
)
_ROBERTA: Final = replace(_BERT, positions_after_padding=True)
_DEBERTA: Final = replace(
    _BERT,
    linears=dict(_BERT.linears)
    | under("attention.self", q="query_proj", k="key_proj", v="value_proj"),
    # Of relative positions, where a checkpoint does not share the tokens' own (share_att_key).
    others=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
)
_DISTILBERT: Final = Family(
    blocks="transformer.layer",
    linears=under("attention", q="q_lin", k="k_lin", v="v_lin", o="out_lin")
    | under("ffn", up="lin1", down="lin2"),
    attention_out="attention.out_lin",
    mlp_out="ffn.lin2",
    norms=("sa_layer_norm", "output_layer_norm"),
    final_norm=None,
    stack="encoder",
)
_MODERNBERT: Final = Family(
    blocks="layers",
    linears=under("attn", o="Wo") | under("mlp", down="Wo"),
    fused={
        "attn.Wqkv": Fused(QKV, equal_parts(3)),
        # The activation is on the first half, so that is the gate.
        "mlp.Wi": Fused(GATE_UP, equal_parts(2)),
    },
    attention_out="attn.Wo",
    mlp_out="mlp.Wo",
    norms=("attn_norm", "mlp_norm"),  # the first block's attn_norm is the identity
    final_norm="final_norm",
    stack="encoder",
)

ENCODERS: Final[Mapping[str, Family]] = MappingProxyType(
    dict.fromkeys(("bert", "electra"), _BERT)
    | dict.fromkeys(("roberta", "xlm-roberta"), _ROBERTA)
    | {"deberta-v2": _DEBERTA, "distilbert": _DISTILBERT, "modernbert": _MODERNBERT}
)
"""Model type (`config.json`) to family."""
