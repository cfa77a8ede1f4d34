"""LoRA: the formula, what trains, what stays, merging, precision."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith.errors import MethodError, TunesmithError
from tunesmith.methods import LoRA
from tunesmith.methods.low_rank import LowRank, Place
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.modes import prepared

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("columns", [None, ((0, 2), (4, 5))])
def test_the_output_is_the_papers_formula(
    rslora: bool, columns: tuple[tuple[int, int], ...] | None
) -> None:
    base = nn.Linear(6, 5).double()
    pair = LowRank(Place("x", 6, 5, 2, 3.0, columns), rslora=rslora, dropout=0.0, init="kaiming")
    nn.init.normal_(pair.B)
    base.register_forward_hook(pair.hook)
    x = torch.randn(4, 3, 6, dtype=torch.float64)

    B = torch.zeros(5, 2, dtype=torch.float64)
    B[[0, 1, 4] if columns else slice(None)] = pair.B.detach().double()
    s = 3.0 / (math.sqrt(2) if rslora else 2)
    expected = x @ (base.weight + s * B @ pair.A.double()).T + base.bias

    torch.testing.assert_close(base(x), expected)


def test_gradients_of_the_pair_are_right() -> None:
    pair = LowRank(Place("x", 4, 5, 2, 3.0, ((1, 4),)), rslora=False, dropout=0.0, init="gaussian")
    nn.init.normal_(pair.double().B)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.func.functional_call(pair, {"A": A, "B": B}, (nn.Identity(), (x,), y))

    pair.forward = pair.act
    assert torch.autograd.gradcheck(output, (x, y, pair.A, pair.B))


def test_the_model_is_the_base_bitwise_at_the_start(
    model: PreTrainedModel, input_ids: Tensor
) -> None:
    before = model(input_ids).logits
    attach(model, LoRA(rank=4, dropout=0.5, bias="none"))
    assert torch.equal(model(input_ids).logits, before)


def test_the_model_is_the_base_bitwise_while_disabled(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    before = model(input_ids).logits
    tuned = trained(attach(model, LoRA(rank=4)))
    assert not torch.equal(model(input_ids).logits, before)
    with tuned.disabled():
        assert torch.equal(model(input_ids).logits, before)
    assert tuned.attachments[0].enabled


def test_merged_and_unmerged_logits_agree(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    tuned = trained(attach(model, LoRA(rank=4, targets=["attention.q", "mlp.down"])))
    unmerged = model(input_ids).logits
    tuned.merge()
    # float32 sums in another order: (W + BA) x against W x + B (A x)
    torch.testing.assert_close(model(input_ids).logits, unmerged, atol=1e-5, rtol=0)


def test_unmerging_restores_the_base_weights_bitwise(
    model: PreTrainedModel, trained: Trained
) -> None:
    model.bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned = trained(attach(model, LoRA(rank=4)))
    tuned.merge()
    tuned.unmerge()
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())
    assert tuned.attachments[0].enabled


def test_merging_into_bfloat16_rounds_once(trained: Trained) -> None:
    model = tiny_llama().bfloat16()
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    before = weight.double()
    tuned = trained(attach(model, LoRA(rank=4, alpha=8, targets=["attention.q"])))
    pair = model.get_submodule("model.layers.0.self_attn.q_proj.lora_default")
    expected = before + 2.0 * pair.B.double() @ pair.A.double()
    tuned.merge()
    torch.testing.assert_close(weight.double(), expected, atol=0, rtol=2**-8)


def test_merged_lora_refuses_to_be_switched_or_merged_again(trained: Trained) -> None:
    tuned = trained(attach(tiny_llama(), LoRA(rank=4)))
    tuned.merge()
    with pytest.raises(MethodError, match="unmerge"), tuned.disabled():
        pass
    with pytest.raises(MethodError, match="unmerge"):
        tuned.attachments[0].merge()


def test_unmerging_what_is_not_merged_is_refused() -> None:
    with pytest.raises(MethodError, match="LoRA is not merged"):
        attach(tiny_llama(), LoRA(rank=4)).attachments[0].unmerge()


def test_detaching_leaves_the_plain_base(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    before, keys = model(input_ids).logits, list(model.state_dict())
    tuned = trained(attach(model, LoRA(rank=4)))
    tuned.merge()
    base = tuned.detach()
    assert torch.equal(base(input_ids).logits, before)
    assert list(base.state_dict()) == keys
    assert all(p.requires_grad for p in base.parameters())
    assert not any(module._forward_hooks for module in base.modules())


def test_base_parameters_keep_their_names(model: PreTrainedModel) -> None:
    before = [name for name, _ in model.named_parameters()]
    attach(model, LoRA(rank=4))
    after = [name for name, _ in model.named_parameters()]
    assert [name for name in after if ".lora_default." not in name] == before


def test_only_the_pairs_train(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    tuned = trained(attach(model, LoRA(rank=4)))
    loss(model, input_ids).backward()
    trainable = tuned.trainable()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable)
        assert parameter.requires_grad == (name in trainable)


def test_a_layer_trains_rank_times_its_two_sides() -> None:
    tuned = attach(tiny_llama(), LoRA(rank=4))
    width, narrow, inner = 32, 16, 48
    sides = 2 * (width + width) + 2 * (width + narrow) + 3 * (width + inner)
    counts = tuned.parameter_counts()
    assert counts.trainable == 2 * 4 * sides
    assert counts.by_kind["model.layers.*.mlp.up_proj.lora_default.A"] == 2 * 4 * width
    assert counts.base == sum(p.numel() for p in tiny_llama().parameters())


def test_one_role_of_a_fused_projection_leaves_the_others_alone(trained: Trained) -> None:
    model = tiny_gpt2()
    fused = model.transformer.h[0].attn.c_attn
    x = torch.randn(3, 32)
    before = fused(x)
    tuned = trained(attach(model, LoRA(rank=4, targets=["attention.q", "attention.v"])))
    after = fused(x)
    assert fused.lora_default.B.shape == (64, 4)
    assert torch.equal(after[:, 32:64], before[:, 32:64])
    assert not torch.isclose(after[:, :32], before[:, :32]).any()
    assert not torch.isclose(after[:, 64:], before[:, 64:]).any()
    assert len(tuned.trainable()) == 2 * 2


def test_bias_all_trains_every_bias_of_the_model(
    input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    model = tiny_gpt2()
    expected = {
        name.removesuffix(".bias") for name, _ in model.named_parameters() if "bias" in name
    }
    base_logits = model(input_ids).logits
    tuned = attach(model, LoRA(rank=4, bias="all"))
    assert torch.equal(model(input_ids).logits, base_logits)
    trained(tuned)
    loss(model, input_ids).backward()
    found = {name.removesuffix(".bias_default.value") for name in tuned.trainable()}
    assert expected < found
    assert all(p.grad is not None for p in tuned.trainable().values())
    with tuned.disabled():
        assert torch.equal(model(input_ids).logits, base_logits)


def test_a_trained_bias_replaces_the_base_bias(input_ids: Tensor, trained: Trained) -> None:
    model, plain = tiny_gpt2(), tiny_gpt2()
    plain.load_state_dict(model.state_dict())
    tuned = trained(attach(model, LoRA(rank=4, bias="all")))
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if name.endswith(".B"):
                parameter.zero_()
            if name.endswith(".bias_default.value"):
                plain.get_parameter(name.replace("bias_default.value", "bias")).copy_(parameter)
    # the same sum, taken as (W x + b0) + (b - b0)
    torch.testing.assert_close(
        model(input_ids).logits, plain(input_ids).logits, atol=1e-5, rtol=1e-5
    )


def test_dropout_acts_in_training_only(input_ids: Tensor, trained: Trained) -> None:
    model = tiny_llama()
    trained(attach(model, LoRA(rank=4, dropout=0.5)))
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("training", [True, False])
def test_children_take_over_their_parents_mode(training: bool) -> None:
    model = tiny_llama().train(training)
    attach(model, LoRA(rank=4))
    assert all(module.training == training for module in model.modules())


def test_a_bfloat16_base_trains_float32_pairs_without_autocast(
    input_ids: Tensor, loss: Loss
) -> None:
    model = tiny_llama().bfloat16()
    tuned = attach(model, LoRA(rank=4))
    optimizer = torch.optim.SGD(tuned.trainable().values(), lr=1.0)
    before = loss(model, input_ids)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, input_ids).backward()
        optimizer.step()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in tuned.trainable().values())
    assert model(input_ids).logits.dtype == torch.bfloat16
    assert loss(model, input_ids) < before


def test_the_low_rank_path_keeps_no_second_copy_of_the_input() -> None:
    base = nn.Linear(64, 64).bfloat16().requires_grad_(False)
    pair = LowRank(Place("x", 64, 64, 2, 4.0), rslora=False, dropout=0.0, init="kaiming")
    base.register_forward_hook(pair.hook)
    x = torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        base(x)
    as_large = [t for t in saved if t.numel() >= x.numel()]
    assert {t.untyped_storage().data_ptr() for t in as_large} == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(
    reentrant: bool, model: PreTrainedModel, input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    tuned = trained(attach(model.train(), LoRA(rank=4)))
    loss(model, input_ids).backward()
    plain = {name: p.grad.clone() for name, p in tuned.trainable().items()}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss(model, input_ids).backward()
    for name, parameter in tuned.trainable().items():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_the_default_scale_does_not_depend_on_the_rank() -> None:
    assert LoRA(rank=4).strength / 4 == LoRA(rank=64).strength / 64 == 2.0
    assert LoRA(rslora=True).strength / math.sqrt(LoRA().rank) == 2.0
    assert LoRA(alpha=5).strength == 5.0


@pytest.mark.parametrize(
    ("init", "deviation"), [("kaiming", 1 / math.sqrt(3 * 400)), ("gaussian", 1 / 8)]
)
def test_a_starts_random_and_b_at_zero(init: str, deviation: float) -> None:
    pair = LowRank(Place("x", 400, 30, 8, 16.0), rslora=False, dropout=0.0, init=init)
    assert pair.A.std().item() == pytest.approx(deviation, rel=0.1)  # 3,200 samples
    assert not pair.B.any()


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"init": "zeros"}, {"targets": []}, {"r": 4}],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LoRA.model_validate(wrong)


def test_a_rank_larger_than_the_layer_is_refused(input_ids: Tensor) -> None:
    model = tiny_llama()
    before = model(input_ids).logits
    message = r"method\.rank: 17 .*\.layers\.0\.self_attn\.k_proj \(16 x 32\); use at most 16"
    with pytest.raises(MethodError, match=message):
        attach(model, LoRA(rank=17))
    assert torch.equal(model(input_ids).logits, before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_larger_than_the_targeted_columns_is_refused() -> None:
    with pytest.raises(MethodError, match=r"method\.rank: 33 .* \(32 x 32\)"):
        attach(tiny_gpt2(), LoRA(rank=33, targets=["attention.q"]))


def test_an_unknown_site_is_refused_by_name() -> None:
    with pytest.raises(TunesmithError, match=r"method\.targets: 'qkv'"):
        attach(tiny_llama(), LoRA(targets=["qkv"]))


def test_bias_all_is_refused_where_there_are_no_biases() -> None:
    with pytest.raises(MethodError, match=r"method\.bias: all trains nothing"):
        attach(tiny_llama(), LoRA(rank=4, bias="all"))


def test_bias_all_is_refused_where_a_bias_is_used_in_an_unknown_way() -> None:
    model = tiny_gpt2()
    model.odd = nn.GroupNorm(2, 4)
    with pytest.raises(MethodError, match="odd is a GroupNorm"):
        attach(model, LoRA(rank=4, bias="all"))
    assert all(p.requires_grad for p in model.parameters())


def test_the_bias_of_a_head_is_never_left_without_gradient_in_silence() -> None:
    config = PhiConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=2,
    )
    with pytest.raises(MethodError, match=r"method.bias: lm_head has a bias, .*; use none"):
        attach(PhiForCausalLM(config), LoRA(rank=2, bias="all"))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_pair_that_is_prepared_gives_the_same_until_it_is_forgotten(rslora: bool) -> None:
    model = tiny_llama()
    tuned = attach(model, LoRA(rank=4, alpha=3.0, rslora=rslora))
    for parameter in tuned.trainable().values():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with prepared(model):
            torch.testing.assert_close(model(ids).logits, expected)
        for parameter in tuned.trainable().values():
            parameter.mul_(2)
        assert not torch.allclose(model(ids).logits, expected)
    model(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in tuned.trainable().values())
