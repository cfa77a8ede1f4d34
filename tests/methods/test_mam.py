"""MAM is a prefix and a parallel adapter, saved and switched as one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES
from tiny import tiny_llama
from tunesmith import MAM, Adapter, LoRA, PrefixTuning, attach, load_adapter
from tunesmith.errors import MethodError
from tunesmith.methods.tuned import TunedModel

Trained = Callable[[TunedModel], TunedModel]

METHOD = MAM(prefix_length=3, bottleneck=4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "t5"])
def test_it_is_its_two_methods_bitwise(family: str, trained: Trained) -> None:
    own = FAMILIES[family]
    tuned = trained(attach(own.make(), METHOD))
    inputs = own.inputs(torch.arange(3, 17).reshape(2, 7))
    with torch.no_grad():
        expected = tuned.model(**inputs).logits
        state = {name: p.clone() for name, p in tuned.state_dict().items()}
        parts = [PrefixTuning(length=3), Adapter(placement="parallel", bottleneck=4, scale=4.0)]
        plain = attach(tuned.detach(), *parts)
        plain.load_state_dict(state)
        assert torch.equal(plain.model(**inputs).logits, expected)


def test_the_feed_forward_gets_the_papers_scaled_change(trained: Trained) -> None:
    tuned = trained(attach(tiny_llama(), METHOD))
    mlp = tuned.model.get_submodule("model.layers.0.mlp")
    adapter = mlp.down_proj.adapter_default
    x = torch.randn(2, 5, 32)
    got = mlp(x)
    with tuned.disabled():
        base = mlp(x)
    W, c, U, d = (
        p.double()
        for p in (
            adapter.down.weight,
            adapter.down.bias,
            adapter.up.weight,
            adapter.up.bias,
        )
    )
    expected = base.double() + 4 * (torch.relu(x.double() @ W.T + c) @ U.T + d)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_one_file_holds_both_and_loads_bitwise(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained, tmp_path: Path
) -> None:
    tuned = trained(attach(model, METHOD))
    with torch.no_grad():
        expected = model(input_ids).logits
        tuned.save(tmp_path / "a")
        stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert set(stored) == set(tuned.trainable())
        loaded = load_adapter(tuned.detach(), tmp_path / "a")
        assert torch.equal(model(input_ids).logits, expected)
    assert [part.method for part in loaded.parts] == [METHOD]


def test_the_default_sizes_are_half_of_the_width() -> None:
    methods = MAM().methods
    assert methods["prefix"] == PrefixTuning(length=30)
    assert methods["adapter"] == Adapter(placement="parallel", reduction_factor=2, scale=4.0)


def test_the_prefix_learns_at_its_own_rate() -> None:
    scales = attach(tiny_llama(), METHOD).learning_rate_scales()
    ratio = PrefixTuning.default_learning_rate / Adapter.default_learning_rate
    for name, scale in scales.items():
        assert scale == pytest.approx(ratio if ".prefix_tuning_" in name else 1.0)


def test_it_stands_beside_other_methods(trained: Trained, input_ids: Tensor) -> None:
    tuned = trained(attach(tiny_llama(), METHOD, LoRA(rank=4)))
    on = tuned.model(input_ids).logits
    tuned.attachments[0].enable(False)
    assert not torch.equal(tuned.model(input_ids).logits, on)
    tuned.attachments[0].enable(True)
    assert torch.equal(tuned.model(input_ids).logits, on)


def test_merging_and_exporting_are_refused_in_its_own_name(tmp_path: Path) -> None:
    tuned = attach(tiny_llama(), METHOD)
    with pytest.raises(MethodError, match="mam adds keys and values"):
        tuned.merge()
    with pytest.raises(MethodError, match="PEFT has no format"):
        tuned.export_peft(tmp_path / "a")
