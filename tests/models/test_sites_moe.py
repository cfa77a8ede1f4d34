"""The sites of mixtures of experts: what they are, where they act, what is refused."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel

from families import FAMILIES, VOCAB
from numerics.matrix import IDS, ROWS
from tunesmith.errors import ModelError
from tunesmith.methods.full import Full
from tunesmith.methods.lora import LoRA
from tunesmith.methods.tuned import attach
from tunesmith.models.attention import enable_segments
from tunesmith.models.families_moe import MIXTURES
from tunesmith.models.sites import Site, find_sites

FAMILY_NAMES = ("mixtral", "qwen2_moe", "qwen3_moe")
PLAIN = ("attention.q", "attention.k", "attention.v", "attention.o")
EXPERTS = ("mlp.gate", "mlp.up", "mlp.down")
SHARED = ("shared.gate", "shared.up", "shared.down")


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family].make()


def olmoe() -> PreTrainedModel:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def site(model: PreTrainedModel, name: str, block: int = 1) -> Site:
    return next(s for s in find_sites(model).blocks[block].sites if s.name == name)


def test_experts_have_the_names_of_the_feed_forward() -> None:
    assert find_sites(make("mixtral")).names == (*PLAIN, *EXPERTS)
    assert find_sites(make("qwen3_moe")).names == (*PLAIN, *EXPERTS)
    assert find_sites(make("qwen2_moe")).names == (*PLAIN, *EXPERTS, *SHARED)
    assert find_sites(olmoe()).names == (*PLAIN, *EXPERTS)


def test_every_mixture_of_the_table_is_here() -> None:
    assert set(MIXTURES) == {*FAMILY_NAMES, "olmoe"}


def test_a_site_of_experts_says_what_is_needed_to_attach() -> None:
    model = make("mixtral")
    path = "model.layers.1.mlp.experts"
    assert site(model, "mlp.up") == Site(
        "mlp.up", path, "experts", 32, 48, ((48, 96),), 1, parameter="gate_up_proj", num_experts=4
    )
    assert site(model, "mlp.down") == Site(
        "mlp.down", path, "experts", 48, 32, None, 1, parameter="down_proj", num_experts=4
    )


def test_a_dense_block_beside_mixtures_has_linear_maps() -> None:
    model = make("qwen2_moe")
    assert {site(model, name, 0).kind for name in EXPERTS} == {"linear"}
    assert {site(model, name, 1).kind for name in EXPERTS} == {"experts"}
    assert site(model, "shared.down").module == "model.layers.1.mlp.shared_expert.down_proj"


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_columns_are_what_they_are_called(family: str, name: str) -> None:
    """With the columns at zero: no gate and no up leave the experts nothing to put out."""
    model = make(family)
    place = site(model, name)
    experts = model.get_submodule(place.module)
    with torch.no_grad():
        start, stop = place.columns[0] if place.columns else (0, place.out_features)
        experts.get_parameter(place.parameter)[:, start:stop].zero_()
    x, index, shares = torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    assert not experts(x, index, shares).any()


def test_gate_is_the_part_under_the_activation() -> None:
    """silu(-large) is zero, and -large times the other part is not."""
    model = make("mixtral")
    gate = site(model, "mlp.gate")
    experts = model.get_submodule(gate.module)
    (start, stop), *_ = gate.columns or ()
    with torch.no_grad():
        experts.get_parameter(gate.parameter)[:, start:stop] = -1e4
    out = experts(torch.ones(1, 32), torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert not out.any()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_branch_output_is_what_joins_the_residual(family: str) -> None:
    model = make(family)
    seen: dict[str, Tensor] = {}
    for block in find_sites(model).blocks:
        for path in (block.attention_out, block.mlp_out):
            keep = lambda m, a, out, path=path: seen.__setitem__(path, out)  # noqa: E731
            model.get_submodule(path).register_forward_hook(keep)
    out = model.model(IDS, output_hidden_states=True)
    before, after = out.hidden_states[0], out.hidden_states[1]
    joined = before + seen["model.layers.0.self_attn.o_proj"] + seen["model.layers.0.mlp"]
    torch.testing.assert_close(joined, after)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_router_trains_under_full_alone(family: str) -> None:
    tuned = attach(make(family), LoRA(rank=4))
    tuned.model(input_ids=IDS, labels=IDS).loss.backward()
    router = tuned.model.get_submodule("model.layers.1.mlp.gate").weight
    assert router.grad is None
    tuned = attach(make(family), Full())
    tuned.model(input_ids=IDS, labels=IDS).loss.backward()
    assert tuned.model.get_submodule("model.layers.1.mlp.gate").weight.grad.any()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_samples_of_a_packed_row_do_not_see_each_other(family: str) -> None:
    assert enable_segments(make(family))


def test_a_module_that_the_table_does_not_know_is_named() -> None:
    model = make("qwen2_moe")
    model.model.layers[1].mlp.second_router = nn.Linear(32, 4)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.second_router \(Linear\) is not"):
        find_sites(model)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_choice_of_the_matrix_tokens_hangs_on_rounding(family: str) -> None:
    """Else a comparison to 1e-5 could differ by a whole expert."""
    model = make(family)
    gaps: list[Tensor] = []

    def measure(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        best = output[0].topk(3, dim=-1).values
        gaps.append((best[:, 1] - best[:, 2]).min())

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(measure)
    for ids in (IDS, *(row[None] for row in ROWS)):
        model(input_ids=ids)
    assert torch.stack(gaps).min() > 1e-3
