"""Adapters: the papers' equations in float64, sizes, starts, refusals."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from tiny import VOCAB, tiny_gpt2, tiny_llama
from tunesmith.errors import MethodError
from tunesmith.methods import Adapter
from tunesmith.methods.bottleneck import Bottleneck
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.sites import find_sites

Trained = Callable[[TunedModel], TunedModel]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}


def papers_adapter(adapter: Bottleneck, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """s W_up f(W_down x + b_down) + s b_up for x (..., width), in float64."""
    p = {name: value.detach().double() for name, value in adapter.named_parameters()}
    if "norm.weight" in p:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        x = centred / (variance + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    h = f(x @ p["down.weight"].T + p["down.bias"])
    s = p.get("scale", adapter.scale)
    return s * (h @ p["up.weight"].T + p["up.bias"])


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("scale", ["learned", 2.5])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_the_output_is_the_papers_formula(
    activation: str, scale: float | str, layer_norm: bool
) -> None:
    method = Adapter(bottleneck=3, activation=activation, scale=scale, layer_norm=layer_norm)
    adapter = method.module(6).double()
    randomise(adapter)
    h = torch.randn(4, 5, 6, dtype=torch.float64)
    expected = h + papers_adapter(adapter, h, FUNCTIONS[activation])
    torch.testing.assert_close(adapter.act(nn.Identity(), (), h), expected)


def test_gradients_are_right() -> None:
    adapter = Adapter(bottleneck=2, activation="tanh", scale="learned").module(4).double()
    randomise(adapter)
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names = list(dict(adapter.named_parameters()))

    def output(h: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(adapter, named, (nn.Identity(), (), h))

    adapter.forward = adapter.act
    assert torch.autograd.gradcheck(output, (h, *adapter.parameters()))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_the_branches_are_where_the_papers_have_them(
    placement: str, trained: Trained, input_ids: Tensor
) -> None:
    model = tiny_llama(num_hidden_layers=1)
    plain = copy.deepcopy(model.model.layers[0])
    trained(attach(model, Adapter(placement=placement, bottleneck=4)))
    block = model.model.layers[0]
    x = torch.randn(2, 7, 32)
    angles = model.model.rotary_emb(x, torch.arange(7)[None])
    out = block(x, position_embeddings=angles, attention_mask=None)

    attended = plain.self_attn(
        plain.input_layernorm(x), position_embeddings=angles, attention_mask=None
    )[0]
    if placement == "houlsby":
        adapter = block.self_attn.o_proj.adapter_default
        attended = attended + papers_adapter(adapter, attended.double(), FUNCTIONS["gelu"])
    residual = x + attended
    inner = plain.post_attention_layernorm(residual.float())
    fed = plain.mlp(inner)
    adapter = block.mlp.down_proj.adapter_default
    seen = inner if placement == "parallel" else fed
    function = FUNCTIONS["gelu" if placement == "houlsby" else "relu"]
    expected = residual + fed + papers_adapter(adapter, seen.double(), function)

    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_after_a_norm_that_ends_the_branch(trained: Trained) -> None:
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    tuned = trained(attach(model, Adapter(placement="houlsby", bottleneck=4)))
    assert {name.split(".adapter_default")[0] for name in tuned.trainable()} == {
        "model.layers.0.post_attention_layernorm",
        "model.layers.0.post_feedforward_layernorm",
    }


def test_parallel_works_where_the_block_has_no_feed_forward_module(
    trained: Trained, input_ids: Tensor
) -> None:
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    )
    model = OPTForCausalLM(config).eval()
    seen: list[Tensor] = []
    trained(attach(model, Adapter(placement="parallel", bottleneck=4)))
    layer = model.model.decoder.layers[0]
    layer.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.fc2.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(input_ids)
    x, inner, output = seen
    change = papers_adapter(layer.fc2.adapter_default, x.double(), FUNCTIONS["relu"])
    expected = nn.functional.linear(inner, layer.fc2.weight, layer.fc2.bias) + change
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_no_activation_is_kept_after_a_forward_pass(trained: Trained, input_ids: Tensor) -> None:
    model = tiny_llama()
    trained(attach(model, Adapter(placement="parallel", bottleneck=4)))
    model(input_ids)
    assert all(layer.mlp.up_proj.adapter_default_input.seen is None for layer in model.model.layers)


def test_a_copy_of_a_parallel_adapter_reads_its_own_input(
    trained: Trained, input_ids: Tensor
) -> None:
    model = tiny_llama()
    tuned = trained(attach(model, Adapter(placement="parallel", bottleneck=4)))
    logits = model(input_ids).logits
    other = copy.deepcopy(model)
    tuned.detach()
    assert torch.equal(other(input_ids).logits, logits)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(("placement", "count"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_an_adapter_trains_twice_its_two_sides(
    placement: str, count: int, make: Callable[[], PreTrainedModel]
) -> None:
    method = Adapter(placement=placement, reduction_factor=8)
    tuned = attach(make(), method)
    assert tuned.parameter_counts().trainable == 2 * count * (2 * 32 * 4 + 4 + 32)


def test_houlsbys_example_has_49152_weights() -> None:
    adapter = Adapter(bottleneck=24).module(1024)
    weights = sum(p.numel() for n, p in adapter.named_parameters() if n.endswith("weight"))
    assert (weights, sum(p.numel() for p in adapter.parameters())) == (49_152, 49_152 + 24 + 1024)


def test_near_identity_starts_small_and_truncated() -> None:
    adapter = Adapter(bottleneck=64, init="near_identity").module(256)
    for weight in (adapter.down.weight, adapter.up.weight):
        assert 0 < weight.abs().max() <= 0.02
        # a Gaussian cut at two standard deviations has 0.88 of its deviation left
        assert weight.std().item() == pytest.approx(0.0088, rel=0.05)
    assert not adapter.down.bias.any()


def test_the_default_size_is_a_sixteenth_of_the_width() -> None:
    assert Adapter().module(64).down.weight.shape == (4, 64)


def test_the_papers_scales() -> None:
    assert Adapter(placement="parallel").module(32).scale == 4.0
    assert Adapter(placement="houlsby").module(32).scale == 1.0
    assert torch.equal(Adapter(scale="learned").module(32).scale.detach(), torch.ones(1))


@pytest.mark.parametrize(
    "wrong",
    [{"bottleneck": 0}, {"placement": "serial"}, {"activation": "sin"}, {"reduction_factor": 0}],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Adapter.model_validate(wrong)


def test_two_sizes_are_refused() -> None:
    with pytest.raises(ValidationError, match="set one of them"):
        Adapter(bottleneck=4, reduction_factor=8)


def test_a_reduction_factor_beyond_the_width_is_refused() -> None:
    message = r"method\.reduction_factor: 64 leaves nothing of the model's width 32; use at most 32"
    with pytest.raises(MethodError, match=message):
        attach(tiny_llama(), Adapter(reduction_factor=64))


def test_a_taken_name_is_refused() -> None:
    tuned = attach(tiny_llama(), Adapter())
    with pytest.raises(MethodError, match="an adapter named 'default' is already attached"):
        attach(tuned, Adapter())
    attach(tuned, Adapter(), name="second")


def test_parallel_needs_a_feed_forward_whose_input_it_can_read() -> None:
    model = tiny_llama()
    sites = find_sites(model)
    bare = [
        replace(block, sites=tuple(s for s in block.sites if not s.name.startswith("mlp")))
        for block in sites.blocks
    ]
    with pytest.raises(
        MethodError, match=r"method\.placement: parallel reads the input of mlp\.up"
    ):
        Adapter(placement="parallel").attach(model, replace(sites, blocks=tuple(bare)))
