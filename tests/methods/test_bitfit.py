"""BitFit: which biases train, biases that are added, merging, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tiny import VOCAB, tiny_gpt2, tiny_llama
from tunesmith.errors import MethodError
from tunesmith.methods import BitFit, LoRA
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]


def tiny_qwen2() -> PreTrainedModel:
    """Biases at queries, keys and values only."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def test_every_bias_of_the_model_trains() -> None:
    model = tiny_gpt2()
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    tuned = attach(model, BitFit())
    assert {n.replace("bias_default.value", "bias") for n in tuned.trainable()} == biases
    block = (32 + 3 * 32) + (32 + 32) + 4 * 32 + 32  # norm, qkv, out, norm, up, down
    assert tuned.parameter_counts().trainable == 2 * block + 32


def test_gradients_are_those_of_the_biases_themselves(
    input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    model, plain = tiny_gpt2(), tiny_gpt2()
    plain.load_state_dict(model.state_dict())
    tuned = trained(attach(model, BitFit()))
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            plain.get_parameter(name.replace("bias_default.value", "bias")).copy_(parameter)
    loss(model, input_ids).backward()
    loss(plain, input_ids).backward()
    # the same sum, taken as (W x + b0) + (b - b0)
    torch.testing.assert_close(
        model(input_ids).logits, plain(input_ids).logits, atol=1e-5, rtol=1e-5
    )
    for name, parameter in tuned.trainable().items():
        own = plain.get_parameter(name.replace("bias_default.value", "bias"))
        torch.testing.assert_close(parameter.grad, own.grad, atol=1e-6, rtol=1e-4)


def test_the_small_variant_trains_queries_and_the_intermediate_layer(trained: Trained) -> None:
    model = tiny_gpt2()
    fused, x = model.transformer.h[0].attn.c_attn, torch.randn(3, 32)
    before = fused(x)
    tuned = trained(attach(model, BitFit(targets=["attention.q", "mlp.up"])))
    assert tuned.parameter_counts().trainable == 2 * (32 + 128)
    after = fused(x)
    assert torch.equal(after[:, 32:], before[:, 32:])
    assert not torch.isclose(after[:, :32], before[:, :32]).any()


def test_norms_can_be_named() -> None:
    tuned = attach(tiny_gpt2(), BitFit(targets=["norm"]))
    assert tuned.parameter_counts().trainable == (2 * 2 + 1) * 32
    assert all(".ln_" in name for name in tuned.trainable())


def test_on_a_model_with_few_biases_all_means_those() -> None:
    tuned = attach(tiny_qwen2(), BitFit())
    assert tuned.parameter_counts().trainable == 2 * (32 + 16 + 16)


def test_missing_biases_are_added_at_every_linear_map(input_ids: Tensor, trained: Trained) -> None:
    model, plain = tiny_llama(), tiny_llama(attention_bias=True, mlp_bias=True)
    plain.load_state_dict(model.state_dict(), strict=False)
    tuned = trained(attach(model, BitFit(add_missing=True)))
    assert tuned.parameter_counts().trainable == 2 * (3 * 32 + 2 * 16 + 2 * 48)
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            plain.get_parameter(name.replace("bias_default.value", "bias")).copy_(parameter)
    torch.testing.assert_close(
        model(input_ids).logits, plain(input_ids).logits, atol=1e-5, rtol=1e-5
    )


def test_added_and_own_biases_train_together() -> None:
    tuned = attach(tiny_qwen2(), BitFit(targets=["attention.q", "mlp.up"], add_missing=True))
    assert tuned.parameter_counts().trainable == 2 * (32 + 48)


def test_merging_puts_the_trained_biases_in_place(input_ids: Tensor, trained: Trained) -> None:
    model = tiny_gpt2()
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned = trained(attach(model, BitFit(targets=["attention.v", "norm"])))
    beside = model(input_ids).logits
    expected = model.transformer.h[0].attn.c_attn.bias_default.value.clone()
    tuned.merge()
    merged = model.transformer.h[0].attn.c_attn.bias
    assert torch.equal(merged[64:], expected)
    assert torch.equal(merged[:64], before["transformer.h.0.attn.c_attn.bias"][:64])
    torch.testing.assert_close(model(input_ids).logits, beside, atol=1e-5, rtol=1e-5)
    tuned.unmerge()
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


def test_added_biases_cannot_merge() -> None:
    model = tiny_llama()
    tuned = attach(model, BitFit(add_missing=True))
    with pytest.raises(MethodError, match="q_proj has no bias in a plain model"):
        tuned.merge()
    assert tuned.attachments[0].enabled


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (tiny_llama, BitFit(), r"method\.add_missing: this llama has no biases"),
        (
            tiny_qwen2,
            BitFit(targets=["attention.q", "mlp.up"]),
            r"method\.targets: model\.layers\.0\.mlp\.up_proj of this qwen2 has no bias",
        ),
        (tiny_llama, BitFit(targets=["norm"]), r"method\.targets: no norm of this llama has"),
        (tiny_gpt2, BitFit(targets=["mlp.gate"]), r"method\.targets: 'mlp.gate' is not a site"),
    ],
)
def test_what_has_no_bias_is_refused(
    make: Callable[[], PreTrainedModel], method: BitFit, message: str
) -> None:
    with pytest.raises(MethodError, match=message):
        attach(make(), method)


def test_two_methods_cannot_train_one_bias() -> None:
    tuned = attach(tiny_gpt2(), LoRA(rank=2, bias="all"))
    with pytest.raises(MethodError, match="already attached at"):
        attach(tuned, BitFit())


def test_the_heads_bias_stays_the_bases() -> None:
    model = tiny_gpt2()
    model.lm_head = nn.Linear(32, VOCAB)
    assert not any("lm_head" in name for name in attach(model, BitFit()).trainable())


def test_a_module_that_uses_its_bias_in_an_unknown_way_is_named() -> None:
    model = tiny_gpt2()
    model.transformer.odd = nn.GroupNorm(2, 4)
    message = r"method\.targets: transformer\.odd is a GroupNorm, .* name the sites"
    with pytest.raises(MethodError, match=message):
        attach(model, BitFit())
