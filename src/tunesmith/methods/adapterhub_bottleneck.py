"""AdapterHub's bottleneck adapters and Compacter, as ours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from tunesmith.errors import AdapterError
from tunesmith.methods.adapter import Adapter
from tunesmith.methods.bottleneck import Activation, Bottleneck, Placement
from tunesmith.methods.compacter import Compacter, SharedA

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.methods.adapterhub_files import HubAdapter
    from tunesmith.methods.bottleneck import BottleneckAttachment
    from tunesmith.models.sites import Sites

_PLAIN: Final[dict[str, Any]] = {
    "original_ln_after": True,
    "ln_after": False,
    "residual_before_ln": True,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "leave_out": [],
    "stochastic_depth": 0.0,
}
"""What has to be so, or it computes something that no adapter here does."""
_PLAIN_KRONECKER: Final[dict[str, Any]] = {
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_bias": True,
    "ln_before": False,
    "scaling": 1.0,
}
_ACTIVATIONS: Final[dict[str, Activation]] = {
    "relu": "relu",
    "gelu": "gelu",
    "tanh": "tanh",
    "swish": "silu",
    "silu": "silu",
}
_NAME: Final = re.compile(r"\.(\d+)\.([a-z_.]+)\.adapters\.[^.]+\.(?:(adapter_\w+)\.)?(.+)$")
_BRANCHES: Final = {
    "attention.output": "attention",
    "attention_adapters": "attention",
    "output": "mlp",
    "output_adapters": "mlp",
}
"""Where AdapterHub hangs an adapter in a block, to the branch whose output it changes."""
_PARTS: Final = {
    "adapter_norm_before": "norm",
    "adapter_down": "down",
    "adapter_up": "up",
    None: "scale",
}
_LEAVES: Final = {"W_left": "s", "W_right": "t", "b": "bias"}
"""Of Compacter's maps; those of a plain adapter are called the same."""


def attach_bottleneck(
    hub: HubAdapter, model: PreTrainedModel, sites: Sites, *, name: str
) -> tuple[Adapter | Compacter, BottleneckAttachment]:
    """Put the adapters of `hub` on the model.

    Raises:
        AdapterError: they compute what no adapter here does, or do not fit the model.
        MethodError: the name is taken.
    """
    method = _method(hub, model.config.get_text_config().hidden_size, sites)
    attachment = method.attach(model, sites, name=name)
    attachment.load_state_dict(_state(hub, attachment, sites))
    return method, attachment


def _method(hub: HubAdapter, width: int, sites: Sites) -> Adapter | Compacter:
    """Return the method that computes what the configuration says."""
    config = hub.config
    hub.require(_PLAIN)
    if config["non_linearity"] not in _ACTIVATIONS:
        raise AdapterError(
            f"adapter_config.json: non_linearity {config['non_linearity']!r} cannot be read, only "
            f"{', '.join(sorted(_ACTIVATIONS))} can"
        )
    if not isinstance(config["reduction_factor"], int | float):
        raise AdapterError(
            "adapter_config.json: reduction_factor differs from layer to layer, which no adapter "
            "here does; train it anew with one for all"
        )
    placement = _placement(config, sites)
    settings: dict[str, Any] = {
        "placement": placement,
        "reads": "block" if placement == "pfeiffer" and config["original_ln_before"] else "branch",
        "bottleneck": max(1, int(width // config["reduction_factor"])),
        "activation": _ACTIVATIONS[config["non_linearity"]],
    }
    if not config["phm_layer"]:
        return Adapter(layer_norm=config["ln_before"], scale=config["scaling"], **settings)
    hub.require(_PLAIN_KRONECKER)
    return Compacter(products=config["phm_dim"], rank=config["phm_rank"], **settings)


def _placement(config: dict[str, Any], sites: Sites) -> Placement:
    """Return where the adapters are."""
    where = config["mh_adapter"], config["output_adapter"]
    if config["is_parallel"] and sites.final_norm is not None:
        raise AdapterError(
            "adapter_config.json: is_parallel adapters read the residual there, which in this "
            f"{sites.model_type} is not what the feed-forward reads but what its norm does; train "
            "it anew with method: {name: adapter, placement: parallel}"
        )
    if config["is_parallel"] and where == (False, True):
        return "parallel"
    if where == (True, True) and not config["is_parallel"] and not config["original_ln_before"]:
        return "houlsby"
    if where == (False, True):
        return "pfeiffer"
    raise AdapterError(
        f"adapter_config.json: mh_adapter {where[0]}, output_adapter {where[1]} with is_parallel "
        f"{config['is_parallel']} and original_ln_before {config['original_ln_before']} is no "
        "placement of ours; train it anew with houlsby, pfeiffer or parallel"
    )


def _state(hub: HubAdapter, attachment: BottleneckAttachment, sites: Sites) -> dict[str, Tensor]:
    """Return the tensors of `hub` by our names."""
    places = _places(attachment, sites)
    shared = [path for path, child in attachment.children.items() if isinstance(child, SharedA)]
    state: dict[str, Tensor] = {}
    for key, tensor in hub.tensors.items():
        if shared and key.endswith(f"shared_parameters.{hub.name}.phm_rule"):
            state[f"{shared[0]}.A"] = tensor
            continue
        found = _NAME.search(key)
        place = found and places.get((int(found[1]), _BRANCHES.get(found[2], "")))
        if not found or not place or found[3] not in _PARTS:
            raise AdapterError(f"{key} has no place in this model, so the adapter cannot be read")
        leaf = found[4].rpartition(".")[2]
        inner = "" if found[3] is None else f".{_LEAVES.get(leaf, leaf)}"
        state[f"{place}.{_PARTS[found[3]]}{inner}"] = tensor
    return state


def _places(attachment: BottleneckAttachment, sites: Sites) -> dict[tuple[int, str], str]:
    """Return the path of every adapter by the number of its block and its branch."""
    hung = {
        path.rpartition(".")[0]: path
        for path, child in attachment.children.items()
        if isinstance(child, Bottleneck)
    }
    places: dict[tuple[int, str], str] = {}
    for block in sites.blocks:
        for parent in (block.mlp_out, block.path, *block.norms):
            if parent in hung:
                places[block.index, "mlp"] = hung[parent]
        if block.attention_out in hung:
            places[block.index, "attention"] = hung[block.attention_out]
    return places
