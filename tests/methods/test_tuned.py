"""Attaching, composing, switching, counting."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods import Full, LastLayer, LoRA
from tunesmith.methods.contract import Method
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]


def test_two_adapters_add_up(model: PreTrainedModel, input_ids: Tensor, trained: Trained) -> None:
    tuned = attach(attach(model, LoRA(rank=2), name="a"), LoRA(rank=4, alpha=1), name="b")
    trained(tuned)
    together = model(input_ids).logits
    tuned.merge()
    torch.testing.assert_close(model(input_ids).logits, together, atol=1e-5, rtol=0)
    tuned.unmerge()
    assert torch.equal(model(input_ids).logits, together)


def test_adapters_switch_one_by_one(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    base = model(input_ids).logits
    tuned = trained(attach(model, LoRA(rank=2), name="a"))
    only_a = model(input_ids).logits
    attach(tuned, LoRA(rank=2), name="b")
    for parameter in tuned.attachments[1].trainable().values():
        nn.init.normal_(parameter)
    assert not torch.equal(model(input_ids).logits, only_a)
    tuned.enable(False, "b")
    assert torch.equal(model(input_ids).logits, only_a)
    with tuned.disabled():
        assert torch.equal(model(input_ids).logits, base)
    assert [attachment.enabled for attachment in tuned.attachments] == [True, False]


def test_adapters_and_base_weights_merge_together(input_ids: Tensor, trained: Trained) -> None:
    model = tiny_llama()
    tuned = trained(attach(model, LoRA(rank=2), LastLayer(blocks=0)))
    apart, state = model(input_ids).logits, dict(tuned.state_dict())
    with tuned.merged() as merged:
        torch.testing.assert_close(merged(input_ids).logits, apart, atol=1e-5, rtol=0)
    assert all(torch.equal(t, state[name]) for name, t in tuned.state_dict().items())
    assert torch.equal(model(input_ids).logits, apart)


def test_adapters_and_base_weights_train_together(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    model.bfloat16()
    before = model(input_ids).logits
    tuned = attach(model, LoRA(rank=2), LastLayer(blocks=0))
    trained(tuned)
    with torch.autocast("cpu", torch.bfloat16):
        loss(model, input_ids).backward()
    assert all(p.grad is not None for p in tuned.trainable().values())
    assert tuned.trains_base
    with tuned.disabled():
        assert torch.equal(model(input_ids).logits, before)
    assert torch.equal(tuned.detach()(input_ids).logits, before)


def test_full_after_lora_selects_the_base_only() -> None:
    tuned = attach(tiny_llama(), LoRA(rank=2))
    attach(tuned, Full(), name="b")
    names = tuned.attachments[1].trainable()
    assert not any("lora_" in name for name in names)
    pairs = sum(p.numel() for p in tuned.attachments[0].trainable().values())
    counts = tuned.parameter_counts()
    assert counts.trainable == pairs + counts.base


def test_the_same_name_twice_is_refused_and_the_first_stays(input_ids: Tensor) -> None:
    tuned = attach(tiny_llama(), LoRA(rank=2))
    with pytest.raises(MethodError, match="an adapter named 'default' is already attached"):
        attach(tuned, LoRA(rank=2))
    assert len(tuned.parts) == 1
    assert all(p.requires_grad for p in tuned.trainable().values())


def test_a_failing_method_takes_back_those_attached_with_it(input_ids: Tensor) -> None:
    model = tiny_llama()
    before, names = model(input_ids).logits, list(model.state_dict())
    with pytest.raises(MethodError, match=r"method\.blocks"):
        attach(model, LoRA(rank=2), LastLayer(blocks=9))
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(input_ids).logits, before)


def test_a_model_with_an_adapter_wants_its_tuned_model() -> None:
    model = tiny_llama()
    attach(model, LoRA(rank=2))
    with pytest.raises(MethodError, match="give attach the tuned model"):
        attach(model, LoRA(rank=2), name="b")


def test_a_compiled_model_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].compile()
    with pytest.raises(MethodError, match=r"model\.layers\.1 is compiled"):
        attach(model, LoRA(rank=2))


@pytest.mark.parametrize("name", ["", "a.b", "my adapter"])
def test_a_name_that_is_no_identifier_is_refused(name: str) -> None:
    with pytest.raises(MethodError, match="cannot name an adapter"):
        attach(tiny_llama(), LoRA(rank=2), name=name)


def test_an_unknown_adapter_cannot_be_switched() -> None:
    tuned = attach(tiny_llama(), LoRA(rank=2))
    with pytest.raises(MethodError, match=r"no adapter is named 'x'; there are \['default'\]"):
        tuned.enable(False, "x")


def test_a_method_that_cannot_merge_leaves_none_merged(trained: Trained) -> None:
    model = tiny_llama()
    tuned = trained(attach(model, LoRA(rank=2, targets=["attention.q"])))
    attach(tuned, LoRA(rank=2, targets=["mlp.down"]), name="b")
    quantised = nn.Parameter(torch.zeros(32, 48, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.down_proj.weight = quantised
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(MethodError, match=r"layers\.1\.mlp\.down_proj is quantised"):
        tuned.merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [attachment.enabled for attachment in tuned.attachments] == [True, True]


def test_loading_a_state_that_does_not_fit_changes_nothing() -> None:
    tuned = attach(tiny_llama(), LoRA(rank=2, targets=["mlp.up"]), LastLayer(blocks=0))
    state = {name: torch.ones_like(t) for name, t in tuned.state_dict().items()}
    before = {name: t.clone() for name, t in tuned.state_dict().items()}
    missing = dict(state)
    missing.pop("model.norm.weight")
    with pytest.raises(AdapterError, match=r"model\.norm\.weight is missing"):
        tuned.load_state_dict(missing)
    assert all(torch.equal(t, before[name]) for name, t in tuned.state_dict().items())
    tuned.load_state_dict(state)
    assert all(torch.equal(t, state[name]) for name, t in tuned.state_dict().items())


def test_methods_without_penalty_or_state_add_none() -> None:
    tuned = attach(tiny_llama(), LoRA(rank=2))
    tuned.on_step(1, 10)
    assert tuned.penalty() is None
    assert tuned.extra_state() == {"0": {}}
    tuned.load_extra_state(tuned.extra_state())


@pytest.mark.parametrize(
    "method", [LoRA(rank=4), LastLayer(), Full()], ids=["lora", "last_layer", "full"]
)
def test_an_exported_model_is_a_plain_one_with_the_same_logits(
    method: Method,
    model: PreTrainedModel,
    input_ids: Tensor,
    trained: Trained,
    tmp_path: Path,
) -> None:
    names = list(model.state_dict())
    tuned = trained(attach(model, method))
    expected = model(input_ids).logits
    tuned.export_model(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(loaded(input_ids).logits, expected, atol=1e-5, rtol=0)
    assert list(loaded.state_dict()) == names
    assert torch.equal(model(input_ids).logits, expected)


def test_an_exported_model_keeps_the_bases_dtype(trained: Trained, tmp_path: Path) -> None:
    trained(attach(tiny_gpt2().bfloat16(), Full())).export_model(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_what_is_switched_off_is_not_merged(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    tuned = trained(attach(attach(model, LoRA(rank=2), name="a"), LoRA(rank=2), name="b"))
    tuned.enable(False, "b")
    only_a = model(input_ids).logits
    with tuned.merged():
        torch.testing.assert_close(model(input_ids).logits, only_a, atol=1e-5, rtol=0)
    assert torch.equal(model(input_ids).logits, only_a)
    assert [attachment.enabled for attachment in tuned.attachments] == [True, False]


def test_merging_twice_and_attaching_to_merged_weights_are_refused(trained: Trained) -> None:
    tuned = trained(attach(tiny_llama(), LoRA(rank=2)))
    tuned.merge()
    with pytest.raises(MethodError, match="merged already"):
        tuned.merge()
    with pytest.raises(MethodError, match=r"unmerge\(\) before attaching"):
        attach(tuned, LoRA(rank=2), name="b")
    tuned.unmerge()
    with pytest.raises(MethodError, match="nothing is merged"):
        tuned.unmerge()


def test_a_merged_model_exports_and_stays_merged(
    input_ids: Tensor, trained: Trained, tmp_path: Path
) -> None:
    model = tiny_llama()
    tuned = trained(attach(model, LoRA(rank=2)))
    tuned.merge()
    merged = model(input_ids).logits
    tuned.export_model(tmp_path / "m", tiny_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded(input_ids).logits, merged)
    assert torch.equal(model(input_ids).logits, merged)
    assert (tmp_path / "m" / "tokenizer.json").exists()


def test_attaching_nothing_is_refused() -> None:
    with pytest.raises(MethodError, match="needs a method"):
        attach(tiny_llama())


def test_a_copy_of_a_tuned_model_computes_with_its_own_adapter(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    tuned = trained(attach(model, LoRA(rank=2)))
    logits = model(input_ids).logits
    copy = deepcopy(model)
    for parameter in tuned.trainable().values():
        nn.init.zeros_(parameter)
    assert torch.equal(copy(input_ids).logits, logits)
