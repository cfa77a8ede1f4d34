"""IA3: the formula, PEFT as the reference both ways, what is refused."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from peft import IA3Config, PeftModel
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tiny import VOCAB, tiny_gpt2, tiny_llama
from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods import IA3
from tunesmith.methods.ia3 import InputScale, OutputScale
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")

METHODS = {
    "paper": IA3(),
    "outputs": IA3(targets=["attention.q", "mlp.up"], inputs=[]),
    "inputs": IA3(targets=["attention.o", "mlp.down"], inputs=["attention.o", "mlp.down"]),
}


def test_keys_and_values_are_scaled_after_the_map_and_the_bias() -> None:
    base = nn.Linear(6, 5).double()
    scale = OutputScale(base, "x", ((0, 2), (4, 5)))
    nn.init.normal_(scale.l)
    scale.register_on(base)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    l = torch.ones(5, dtype=torch.float64)  # noqa: E741 - the paper's letter
    l[[0, 1, 4]] = scale.l.detach().double()
    expected = l * (x @ base.weight.T + base.bias)
    # the factors are float32 and l - 1 is rounded once
    torch.testing.assert_close(base(x), expected, atol=1e-6, rtol=1e-6)


def test_the_down_projection_is_scaled_at_its_input() -> None:
    base = Conv1D(5, 6).double()
    scale = InputScale(base, "x")
    nn.init.normal_(scale.l)
    scale.register_on(base)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    expected = (scale.l.detach().double() * x) @ base.weight + base.bias
    torch.testing.assert_close(base(x), expected, atol=1e-6, rtol=1e-6)


def test_a_small_change_of_a_factor_survives_bfloat16() -> None:
    base = nn.Linear(4, 4).bfloat16()
    scale = OutputScale(base, "x")
    x = torch.randn(64, 4, dtype=torch.bfloat16)
    before = base(x)
    nn.init.constant_(scale.l, 1.003)  # bfloat16 knows 1 and 1.0078
    scale.register_on(base)
    assert ((base(x).float() / before.float()).mean() - 1.003).abs() < 1e-3


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_peft_loads_what_is_saved_with_equal_logits_and_gradients(
    method: IA3,
    model: PreTrainedModel,
    trained: Trained,
    input_ids: Tensor,
    loss: Loss,
    tmp_path: Path,
) -> None:
    base = deepcopy(model)
    tuned = trained(attach(model, method))
    tuned.export_peft(tmp_path / "a")
    reference = PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True).eval()
    torch.testing.assert_close(
        model(input_ids).logits, reference(input_ids).logits, atol=1e-5, rtol=1e-5
    )
    loss(model, input_ids).backward()
    loss(reference, input_ids).backward()
    for path, scale in tuned.attachments[0].scales.items():
        theirs = reference.get_submodule(f"base_model.model.{path}").ia3_l["default"].grad.flatten()
        columns = getattr(scale, "columns", None)
        theirs = theirs if columns is None else theirs[columns]
        torch.testing.assert_close(scale.l.grad, theirs)


READABLE = {
    "default": (tiny_llama, {}),
    "default gpt2": (tiny_gpt2, {}),
    "regex": (
        tiny_llama,
        {"target_modules": r".*\.1\..*(q|o)_proj", "feedforward_modules": r".*\.o_proj"},
    ),
    "all-linear": (
        tiny_llama,
        {"target_modules": "all-linear", "feedforward_modules": ["up_proj"]},
    ),
    "no feed-forward": (tiny_gpt2, {"target_modules": ["c_attn"], "feedforward_modules": []}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("make", "settings"), READABLE.values(), ids=READABLE.keys())
def test_a_directory_that_peft_saved_gives_pefts_logits(
    make: Callable[[], PreTrainedModel],
    settings: dict[str, object],
    input_ids: Tensor,
    tmp_path: Path,
) -> None:
    base = make()
    reference = peft.get_peft_model(deepcopy(base), IA3Config(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "a")
    expected = reference.eval()(input_ids).logits
    tuned = load_adapter(base, tmp_path / "a")
    logits = base(input_ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    # and what is saved again says the same
    tuned.save(tmp_path / "b")
    load_adapter(tuned.detach(), tmp_path / "b")
    assert torch.equal(base(input_ids).logits, logits)


def test_as_many_parameters_train_as_in_peft() -> None:
    reference = peft.get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM"))
    ours = attach(tiny_llama(), IA3()).parameter_counts().trainable
    assert ours == reference.get_nb_trainable_parameters()[0] == 2 * (16 + 16 + 48)


def test_only_keys_and_values_of_a_fused_projection_are_scaled(trained: Trained) -> None:
    model = tiny_gpt2()
    fused, x = model.transformer.h[0].attn.c_attn, torch.randn(3, 32)
    before = fused(x)
    tuned = trained(attach(model, IA3()))
    after = fused(x)
    assert fused.ia3_default.l.shape == (64,)
    assert torch.equal(after[:, :32], before[:, :32])
    assert not torch.isclose(after[:, 32:], before[:, 32:]).any()
    assert tuned.parameter_counts().trainable == 2 * (64 + 128)


def test_merging_gives_the_paper_s_weights(trained: Trained) -> None:
    model = tiny_gpt2()
    attention, down = model.transformer.h[0].attn.c_attn, model.transformer.h[0].mlp.c_proj
    nn.init.normal_(attention.bias)
    before = attention.weight.clone(), attention.bias.clone(), down.weight.clone()
    tuned = trained(attach(model, IA3()))
    l_kv = torch.cat([torch.ones(32), attention.ia3_default.l.detach()])
    l_down = down.ia3_default.l.detach()
    tuned.merge()
    assert torch.equal(attention.weight, before[0] * l_kv)
    assert torch.equal(attention.bias, before[1] * l_kv)
    assert torch.equal(down.weight, before[2] * l_down[:, None])


def test_the_input_of_one_site_of_a_fused_projection_cannot_be_scaled() -> None:
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    method = IA3(targets=["mlp.up"], inputs=["mlp.up"])
    with pytest.raises(MethodError, match=r"method\.inputs: .*gate_up_proj computes several sites"):
        attach(Phi3ForCausalLM(config), method)


def test_an_input_that_is_no_target_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"'mlp\.up' is not among the targets"):
        IA3(inputs=["mlp.up"])


def test_an_unknown_site_is_refused_by_name() -> None:
    with pytest.raises(MethodError, match=r"method\.targets: 'qkv'"):
        attach(tiny_llama(), IA3(targets=["qkv"], inputs=[]))


def test_factors_outside_the_recorded_columns_are_refused(tmp_path: Path, trained: Trained) -> None:
    base = tiny_gpt2()
    trained(attach(base, IA3(targets=["attention.q", "attention.k"], inputs=[]))).save(tmp_path)
    record = tmp_path / "tunesmith.json"
    record.write_text(record.read_text().replace('"attention.q",', ""))
    with pytest.raises(AdapterError, match="rescales output columns that"):
        load_adapter(tiny_gpt2(), tmp_path)


def test_a_peft_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    attach(tiny_llama(num_key_value_heads=4), IA3()).export_peft(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"ia3_l has shape \(32, 1\) .* needs \(16, 1\)"):
        load_adapter(tiny_llama(), tmp_path / "a")
