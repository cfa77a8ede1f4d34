"""VeRA: PEFT as the reference, the shared matrices, what is stored."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, VeraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods import VeRA
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:Specified to not save vera_A"),
]


def test_the_vectors_get_pefts_logits_and_gradients(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor, loss: Loss, tmp_path: Path
) -> None:
    base = deepcopy(model)
    tuned = trained(attach(model, VeRA(rank=8, seed=5)))
    tuned.save(tmp_path / "a")
    reference = PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True).eval()
    torch.testing.assert_close(
        model(input_ids).logits, reference(input_ids).logits, atol=1e-5, rtol=1e-5
    )
    loss(model, input_ids).backward()
    loss(reference, input_ids).backward()
    for name, parameter in tuned.trainable().items():
        path, _, leaf = name.partition(".vera_default.")
        expected = reference.get_parameter(f"base_model.model.{path}.vera_lambda_{leaf}.default")
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_peft_loads_parts_of_a_fused_projection(
    trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_gpt2()
    tuned = trained(attach(model, VeRA(rank=8, targets=["attention.q", "attention.v"])))
    expected = model(input_ids).logits
    tuned.save(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tuned.detach(), tmp_path / "a").eval()
    torch.testing.assert_close(loaded(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_projections", [True, False])
def test_a_directory_that_peft_saved_gives_pefts_logits(
    with_projections: bool, model: PreTrainedModel, input_ids: Tensor, tmp_path: Path
) -> None:
    config = VeraConfig(
        r=6,
        target_modules=["q_proj", "down_proj"]
        if model.config.model_type == "llama"
        else ["c_attn", "c_fc"],
        save_projection=with_projections,
        projection_prng_key=7,
        task_type="CAUSAL_LM",
    )
    reference = peft.get_peft_model(deepcopy(model), config)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if with_projections:  # as another version of PyTorch might draw them
            reference.base_model.vera_A["default"].mul_(1.5)
    reference.save_pretrained(tmp_path / "a")
    expected = reference.eval()(input_ids).logits
    tuned = load_adapter(model, tmp_path / "a")
    logits = model(input_ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    tuned.save(tmp_path / "b")
    load_adapter(tuned.detach(), tmp_path / "b")
    assert torch.equal(model(input_ids).logits, logits)


def test_only_d_and_b_are_stored(trained: Trained, tmp_path: Path) -> None:
    tuned = trained(attach(tiny_llama(), VeRA(rank=8)))
    tuned.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    outputs = 32 + 16 + 16 + 32 + 48 + 48 + 32
    assert sum(t.numel() for t in stored.values()) == 2 * (7 * 8 + outputs)
    assert tuned.parameter_counts().trainable == 2 * (7 * 8 + outputs)
    assert {name.rpartition(".")[2] for name in stored} == {"vera_lambda_d", "vera_lambda_b"}


def test_all_layers_share_one_pair_of_matrices() -> None:
    model = tiny_llama()
    attach(model, VeRA(rank=8))
    buffers = [name for name, _ in model.named_buffers() if "vera" in name]
    assert buffers == ["vera_default.A", "vera_default.B"]
    assert model.vera_default.A.shape == (8, 48)
    assert model.vera_default.B.shape == (48, 8)
    assert not any("vera" in name for name in model.state_dict() if not name.endswith((".d", ".b")))


def test_the_seed_decides_the_matrices_and_nothing_else_is_drawn() -> None:
    state = torch.random.get_rng_state()
    first, again, other = tiny_llama(), tiny_llama(), tiny_llama()
    torch.random.set_rng_state(state)
    attach(first, VeRA(rank=8, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    attach(again, VeRA(rank=8, seed=1))
    attach(other, VeRA(rank=8, seed=2))
    assert torch.equal(first.vera_default.A, again.vera_default.A)
    assert not torch.equal(first.vera_default.A, other.vera_default.A)


def test_a_bias_of_peft_is_refused(tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=["c_attn"], bias="all")
    peft.get_peft_model(tiny_gpt2(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="bias 'all' cannot be read"):
        load_adapter(tiny_gpt2(), tmp_path / "a")


def test_a_second_adapter_of_the_same_name_is_refused() -> None:
    tuned = attach(tiny_llama(), VeRA(rank=4, targets=["attention.q"]))
    with pytest.raises(MethodError, match="already attached"):
        attach(tuned, VeRA(rank=4, targets=["mlp.up"]))
