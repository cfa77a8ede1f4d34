"""The part of the architecture table with mixtures of experts.

The experts of a block are one module whose 3-D parameters hold the weights of all of them. The
router, which chooses the experts of a token, is understood and no site: it stays as it is under
every method that does not train the base's own parameters. A shared expert, which every token goes
through beside the chosen ones, is a feed-forward of its own: its sites are `shared.gate`,
`shared.up` and `shared.down`. Blocks with a plain feed-forward may lie between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from tunesmith.models.family import GATE_UP, Experts, Family, Fused, equal_parts, under

_SHARED: Final = {
    "shared.gate": "mlp.shared_expert.gate_proj",
    "shared.up": "mlp.shared_expert.up_proj",
    "shared.down": "mlp.shared_expert.down_proj",
}
_MIXTURE: Final = Family(
    blocks="layers",
    linears=under("self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj")
    | under("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    attention_out="self_attn.o_proj",
    # Of a plain feed-forward too, so that the place is the same in every block.
    mlp_out="mlp",
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_norm",
        "self_attn.k_norm",
    ),
    final_norm="norm",
    experts=Experts(
        "mlp.experts",
        MappingProxyType(
            {
                "gate_up_proj": Fused(GATE_UP, equal_parts(2)),
                "down_proj": Fused(("mlp.down",), equal_parts(1)),
            }
        ),
    ),
    others=("mlp.gate",),
)

MIXTURES: Final[Mapping[str, Family]] = MappingProxyType(
    dict.fromkeys(("mixtral", "olmoe", "qwen3_moe"), _MIXTURE)
    | {
        "qwen2_moe": replace(
            _MIXTURE,
            linears=dict(_MIXTURE.linears) | _SHARED,
            others=(*_MIXTURE.others, "mlp.shared_expert_gate"),
        )
    }
)
"""Model type (`config.json`) to family."""
