"""AdapterHub's LoRA and IA3, as ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from tunesmith.errors import AdapterError
from tunesmith.methods.adapterhub_files import CONFIG
from tunesmith.methods.contract import PeftFiles
from tunesmith.methods.ia3 import IA3
from tunesmith.methods.lora import LoRA
from tunesmith.methods.places import column_index, linear_features

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from tunesmith.methods.adapterhub_files import HubAdapter
    from tunesmith.methods.contract import Attachment, Method
    from tunesmith.models.sites import Site, Sites

_PLAIN: Final[dict[str, Any]] = {"use_gating": False, "use_dora": False, "vera_d": None}


def attach_lora(
    hub: HubAdapter, model: PreTrainedModel, sites: Sites, *, name: str
) -> tuple[Method, Attachment]:
    """Put the LoRA of `hub` on the model.

    In a fused projection AdapterHub has a pair for each of q, k and v; together they are one pair
    of that many times the rank, with the B of each in its own rows and columns.

    Raises:
        AdapterError: it is more than LoRA, or does not fit the model.
        MethodError: the name is taken.
    """
    hub.require(_PLAIN)
    r, alpha = int(hub.config["r"]), float(hub.config["alpha"])
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, (A, B) in _by_module(hub, sites, "lora_A", "lora_B").items():
        parts = _adapted(hub, path, sites)
        fused = len(parts) > 1 or parts[0].columns is not None
        whole = _side_by_side(B, parts, model.get_submodule(path)) if fused else B
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = whole
        ranks[path] = len(A)
    wider = {path: rank for path, rank in ranks.items() if rank != r}
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": hub.config["dropout"],
        "target_modules": sorted(ranks),
        "rank_pattern": wider,
        "alpha_pattern": {path: alpha * rank / r for path, rank in wider.items()},
        "bias": "none",
    }
    files = PeftFiles(config, tensors)
    return LoRA.attach_peft(files, model, sites, recorded=None, name=name)


def attach_ia3(
    hub: HubAdapter, model: PreTrainedModel, sites: Sites, *, name: str
) -> tuple[Method, Attachment]:
    """Put the IA3 of `hub` on the model; it rescales outputs only, unlike the paper's.

    Raises:
        AdapterError: it is more than IA3, or does not fit the model.
        MethodError: the name is taken.
    """
    hub.require({**_PLAIN, "alpha": 1, "leave_out": []})
    factors = _by_module(hub, sites, "lora_B")
    names = {site.name for path in factors for site in _adapted(hub, path, sites)}
    method = IA3(targets=[name for name in sites.names if name in names], inputs=[])
    attachment = method.attach(model, sites, name=name)
    state = {f"{path}.ia3_{name}.l": l.flatten() for path, (l,) in factors.items()}  # noqa: E741
    attachment.load_state_dict(state)
    return method, attachment


def _by_module(hub: HubAdapter, sites: Sites, *leaves: str) -> dict[str, list[Tensor]]:
    """Return the tensors called `leaves` of every adapted linear map, by its path here."""
    modules = {site.module for block in sites.blocks for site in block.sites}
    found: dict[str, list[Tensor]] = {}
    for key in hub.tensors:
        path, _, leaf = key.partition(f".loras.{hub.name}.")
        inside = path.partition(".")[2]  # of the backbone, which a model may have by another name
        here = next((m for m in modules if m == path or m.endswith(f".{inside}")), None)
        if here is None or leaf not in leaves:
            raise AdapterError(f"{key} has no place in this model, so the adapter cannot be read")
        found[here] = [hub.tensors[f"{path}.loras.{hub.name}.{leaf}"] for leaf in leaves]
    return found


def _adapted(hub: HubAdapter, path: str, sites: Sites) -> list[Site]:
    """Return which sites of the linear map at `path` are adapted: q, k and v only if asked for."""
    asked = {f"attention.{matrix}" for matrix in hub.config["attn_matrices"]}
    here = [site for block in sites.blocks for site in block.sites if site.module == path]
    return [site for site in here if len(here) == 1 or site.name in asked]


def _side_by_side(B: Tensor, parts: list[Site], module: nn.Module) -> Tensor:
    """Return B (out, parts * r): each part's (out_features, r) in its rows and its columns."""
    r = B.shape[1]
    whole = B.new_zeros(linear_features("", module)[1], len(parts) * r)
    for i, (part, rows) in enumerate(zip(parts, _split(B, parts), strict=True)):
        whole[column_index(part.columns), i * r : (i + 1) * r] = rows
    return whole


def _split(B: Tensor, parts: list[Site]) -> tuple[Tensor, ...]:
    sizes = [part.out_features for part in parts]
    if sum(sizes) != len(B):
        raise AdapterError(f"{CONFIG}: attn_matrices do not explain the {len(B)} rows of lora_B")
    return torch.split(B, sizes)
