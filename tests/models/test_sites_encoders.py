"""The encoders' part of the architecture table, against hand-written paths and what models do."""

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from tunesmith.errors import ModelError
from tunesmith.models.families_encoders import ENCODERS
from tunesmith.models.sites import Block, Site, find_sites

SIZES: Final = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
DISTIL: Final = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 2}
MODERN: Final = {
    "global_attn_every_n_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "cls_token_id": 0,
    "sep_token_id": 1,
}
POSITIONS: Final = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
CASES: Final[dict[str, tuple[str, dict[str, object]]]] = {
    "bert": ("Bert", SIZES),
    "deberta-v2": ("DebertaV2", SIZES | POSITIONS | {"share_att_key": True}),
    "deberta-v2 with maps for positions": ("DebertaV2", SIZES | POSITIONS),
    "deberta-v2 without positions": ("DebertaV2", SIZES),
    "distilbert": ("DistilBert", {"vocab_size": 64} | DISTIL),
    "electra": ("Electra", SIZES | {"embedding_size": 16}),
    "modernbert": ("ModernBert", SIZES | MODERN),
    "roberta": ("Roberta", SIZES),
    "xlm-roberta": ("XLMRoberta", SIZES),
}
every_case = pytest.mark.parametrize("case", list(CASES))

BERT: Final = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.o": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
DEBERTA: Final = BERT | {f"attention.{x[0]}": f"attention.self.{x}_proj" for x in ("query", "key")}
PATHS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "bert": ("bert.encoder.layer", BERT),
    "deberta-v2": (
        "deberta.encoder.layer",
        DEBERTA | {"attention.v": "attention.self.value_proj"},
    ),
    "distilbert": (
        "distilbert.transformer.layer",
        {f"attention.{x}": f"attention.{x}_lin" for x in "qkv"}
        | {"attention.o": "attention.out_lin", "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2"},
    ),
    "electra": ("electra.encoder.layer", BERT),
    "modernbert": (
        "model.layers",
        {f"attention.{x}": "attn.Wqkv" for x in "qkv"}
        | {"attention.o": "attn.Wo"}
        | {"mlp.gate": "mlp.Wi", "mlp.up": "mlp.Wi", "mlp.down": "mlp.Wo"},
    ),
    "roberta": ("roberta.encoder.layer", BERT),
    "xlm-roberta": ("roberta.encoder.layer", BERT),
}
"""Where each model keeps its blocks, and each site inside one."""


def build(case: str, auto: Any = AutoModelForMaskedLM) -> PreTrainedModel:
    name, settings = CASES[case]
    model = auto.from_config(getattr(transformers, f"{name}Config")(**settings)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for attention to be far from uniform
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def run(model: PreTrainedModel) -> Tensor:
    return model.base_model(input_ids=torch.arange(3, 10)[None]).last_hidden_state


def columns_of(site: Site) -> Tensor:
    return torch.cat([torch.arange(*r) for r in site.columns or ((0, site.out_features),)])


def changed(
    model: PreTrainedModel, block: Block, name: str, factor: Tensor, *, into: str
) -> Tensor:
    """The input of the site `into` with the outputs (length, 1) of the site `name` times factor."""
    sites = {site.name: site for site in block.sites}
    seen: list[Tensor] = []

    def scale(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        if output.shape[1] != len(factor):
            return output  # DeBERTa's positions, which go through the same map
        whole = output.new_ones(len(factor), output.shape[-1])
        whole[:, columns_of(sites[name])] = factor
        return output * whole

    handles = [
        model.get_submodule(sites[name].module).register_forward_hook(scale),
        model.get_submodule(sites[into].module).register_forward_pre_hook(
            lambda _module, args: seen.append(args[0])
        ),
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return seen[0][0]


ONE: Final = torch.ones(7, 1, dtype=torch.float64)
FIRST: Final = torch.tensor([[3.0]] + [[1.0]] * 6, dtype=torch.float64)
"""Scales the first token only."""


@every_case
def test_sites_are_where_they_were_written_down(case: str) -> None:
    sites = find_sites(build(case))
    stack, paths = PATHS[case.partition(" ")[0]]
    for index, block in enumerate(sites.blocks):
        assert (block.path, block.stack) == (f"{stack}.{index}", "encoder")
        found = {site.name: site.module for site in block.sites}
        assert found == {name: f"{block.path}.{path}" for name, path in paths.items()}
    assert len(sites.blocks) == 2
    assert sites.encoder_only


@every_case
def test_a_query_changes_its_own_token_only_and_keys_and_values_all(case: str) -> None:
    model = build(case)
    block = find_sites(model).blocks[-1]
    plain = changed(model, block, "attention.q", ONE, into="attention.o")
    for name, others in (("q", False), ("k", True), ("v", True)):
        other = changed(model, block, f"attention.{name}", FIRST, into="attention.o")
        rows = (other - plain).abs().amax(1) > 1e-9
        assert rows.tolist() == [True] + [others] * 6, name


@every_case
def test_attention_is_linear_in_the_values_and_not_in_the_keys(case: str) -> None:
    model = build(case)
    block = find_sites(model).blocks[-1]
    plain = changed(model, block, "attention.v", ONE, into="attention.o")
    turned = changed(model, block, "attention.v", -ONE, into="attention.o")
    torch.testing.assert_close(turned, -plain)
    keys = changed(model, block, "attention.k", -ONE, into="attention.o")
    assert not torch.allclose(keys, -plain)
    assert not torch.allclose(keys, plain)


@every_case
def test_down_takes_up_linearly_where_there_is_a_gate(case: str) -> None:
    model = build(case)
    block = find_sites(model).blocks[-1]
    gated = "mlp.gate" in {site.name for site in block.sites}
    assert gated == (case == "modernbert")
    plain = changed(model, block, "mlp.up", ONE, into="mlp.down")
    turned = changed(model, block, "mlp.up", -ONE, into="mlp.down")
    assert torch.allclose(turned, -plain) == gated
    if gated:
        assert not torch.allclose(changed(model, block, "mlp.gate", -ONE, into="mlp.down"), -plain)


@every_case
def test_without_its_branches_a_block_only_normalises(case: str) -> None:
    """ModernBERT normalises before the branches, so nothing is left; the others after them."""
    model = build(case)
    block = find_sites(model).blocks[-1]
    for path in block.branches:
        model.get_submodule(path).register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
    seen: list[tuple[Tensor, Tensor]] = []
    model.get_submodule(block.path).register_forward_hook(
        lambda _m, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))
    )
    run(model)
    expected, out = seen[0]
    for norm in block.norms if case != "modernbert" else ():
        expected = model.get_submodule(norm)(expected)
    torch.testing.assert_close(out, expected)


@every_case
def test_every_parameter_of_a_block_is_at_a_site_or_a_norm_or_of_positions(case: str) -> None:
    model = build(case)
    for block in find_sites(model).blocks:
        known = {site.module for site in block.sites} | set(block.norms)
        own = model.get_submodule(block.path)
        positions = {id(p) for n, p in own.named_parameters() if "pos_key" in n or "pos_query" in n}
        owned = {id(p) for path in known for p in model.get_submodule(path).parameters()}
        assert {id(p) for p in own.parameters()} == owned | positions
        assert bool(positions) == (case == "deberta-v2 with maps for positions")


@every_case
@pytest.mark.parametrize(
    "auto",
    [
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    ],
)
def test_embedding_head_and_backbone_are_found_under_every_head(case: str, auto: Any) -> None:
    model = build(case, auto)
    sites = find_sites(model)
    assert model.get_submodule(sites.embedding) is model.get_input_embeddings()
    assert model.get_submodule(sites.backbone) is model.base_model
    head = None if sites.head is None else model.get_submodule(sites.head)
    assert head is model.get_output_embeddings()
    assert (head is not None) == (auto is AutoModelForMaskedLM)


@every_case
def test_only_modernbert_has_a_norm_after_its_last_block(case: str) -> None:
    model = build(case)
    sites = find_sites(model)
    if case != "modernbert":
        assert sites.final_norm is None
        return
    outputs: list[Tensor] = []
    keep: Callable[..., None] = lambda _m, _a, out: outputs.append(out)  # noqa: E731
    model.get_submodule(sites.final_norm or "").register_forward_hook(keep)
    assert torch.equal(run(model), outputs[0])


def test_the_cases_cover_the_encoders() -> None:
    assert {case.partition(" ")[0] for case in CASES} == set(ENCODERS)


def test_cross_attention_in_an_encoder_is_not_understood_and_named() -> None:
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    with pytest.raises(ModelError, match=r"encoder\.layer\.0\.crossattention\.\S+ .* understood"):
        find_sites(AutoModel.from_config(config))
