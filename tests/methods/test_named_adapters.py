"""Several adapters by name on one model: loading, choosing, removing, training one of them."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods import LastLayer, LoRA, PrefixTuning, PromptTuning, PTuningV2
from tunesmith.methods.contract import Method
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4),
    "prompt": PromptTuning(tokens=3),
    "prefix": PrefixTuning(length=2),
    "deep": PTuningV2(length=4),
}


@pytest.fixture
def saved(model: PreTrainedModel, trained: Trained, tmp_path: Path) -> dict[str, Path]:
    """Where adapters for `model` lie, by name."""
    for name, method in METHODS.items():
        tuned = trained(attach(model, method))
        tuned.save(tmp_path / name)
        tuned.detach()
    return {name: tmp_path / name for name in METHODS}


@pytest.fixture
def tuned(model: PreTrainedModel, saved: dict[str, Path]) -> TunedModel:
    """The model with all of them loaded."""
    tuned = TunedModel(model)
    for name, directory in saved.items():
        tuned.load_adapter(name, directory)
    return tuned


def test_each_adapter_acts_as_if_alone(
    model: PreTrainedModel, saved: dict[str, Path], input_ids: Tensor
) -> None:
    base, expected = model(input_ids).logits, {}
    for name, directory in saved.items():
        alone = load_adapter(model, directory)
        expected[name] = model(input_ids).logits
        alone.detach()
    tuned = TunedModel(model)
    for name, directory in saved.items():
        tuned.load_adapter(name, directory)
    assert tuned.adapters == list(saved)
    for name, logits in expected.items():
        tuned.use(name)
        assert torch.equal(model(input_ids).logits, logits)
    tuned.use(None)
    assert torch.equal(model(input_ids).logits, base)


def test_several_act_together_in_any_order_of_names(tuned: TunedModel, input_ids: Tensor) -> None:
    tuned.use(["lora", "prefix"])
    together = tuned.model(input_ids).logits
    tuned.use(["prefix", "lora"])
    assert torch.equal(tuned.model(input_ids).logits, together)
    assert [part.attachment.enabled for part in tuned.parts] == [True, False, True, False]


def test_a_removed_adapter_leaves_nothing_and_the_others_untouched(
    tuned: TunedModel, input_ids: Tensor
) -> None:
    model = tuned.model
    others = {}
    for name in ("prompt", "prefix", "deep"):
        tuned.use(name)
        others[name] = model(input_ids).logits
    tuned.remove("lora")
    assert tuned.adapters == ["prompt", "prefix", "deep"]
    assert not [name for name in model.state_dict() if "lora" in name]
    for name, logits in others.items():
        tuned.use(name)
        assert torch.equal(model(input_ids).logits, logits)


@pytest.mark.parametrize("order", list(permutations(["prompt", "prefix", "deep"])))
def test_after_the_last_is_removed_the_model_is_the_base(
    order: tuple[str, ...], input_ids: Tensor
) -> None:
    model = tiny_llama()
    base, names = model(input_ids).logits, list(model.state_dict())
    attention, required = model.config._attn_implementation, True
    tuned = TunedModel(model)
    for name in ("prompt", "prefix", "deep"):
        attach(tuned, METHODS[name], name=name)
    for name in order:
        tuned.remove(name)
    assert torch.equal(model(input_ids).logits, base)
    assert list(model.state_dict()) == names
    assert model.config._attn_implementation == attention
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {p.requires_grad for p in model.parameters()} == {required}


def test_one_adapter_trains_while_another_acts_frozen(
    model: PreTrainedModel, saved: dict[str, Path], input_ids: Tensor, loss: Loss
) -> None:
    tuned = load_adapter(model, saved["lora"], name="old", trainable=False)
    kept = {n: p.clone() for n, p in tuned.attachments[0].trainable().items()}
    before = model(input_ids).logits
    attach(tuned, LoRA(rank=2), name="new")
    assert torch.equal(model(input_ids).logits, before)  # it acts
    assert {name.rpartition(".")[0].rpartition("_")[2] for name in tuned.trainable()} == {"new"}
    loss(model, input_ids).backward()
    torch.optim.SGD(tuned.trainable().values(), lr=0.1).step()
    assert not torch.equal(model(input_ids).logits, before)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(tuned.trainable())
    assert all(torch.equal(p, kept[n]) for n, p in tuned.attachments[0].trainable().items())


def test_what_is_frozen_is_no_part_of_the_state_but_is_saved(
    model: PreTrainedModel, trained: Trained, tmp_path: Path, input_ids: Tensor
) -> None:
    tuned = trained(attach(attach(model, LoRA(rank=2), name="a"), LoRA(rank=4), name="b"))
    tuned.freeze("a")
    assert all("lora_b" in name for name in tuned.state_dict())
    assert tuned.learning_rate_scales().keys() == tuned.trainable().keys()
    tuned.load_state_dict(tuned.state_dict())
    tuned.save(tmp_path / "both")
    tuned.save(tmp_path / "one", "b")
    logits = model(input_ids).logits
    tuned.use("b")
    only_b = model(input_ids).logits
    again = load_adapter(tuned.detach(), tmp_path / "both")
    assert again.adapters == ["a", "b"]
    assert torch.equal(model(input_ids).logits, logits)
    assert load_adapter(again.detach(), tmp_path / "one").adapters == ["b"]
    assert torch.equal(model(input_ids).logits, only_b)


def test_unfrozen_trains_again(model: PreTrainedModel) -> None:
    tuned = attach(attach(model, LoRA(rank=2), name="a"), LoRA(rank=4), name="b")
    everything = tuned.trainable().keys()
    tuned.freeze()
    assert tuned.trainable() == {}
    assert not any(p.requires_grad for p in model.parameters())
    tuned.unfreeze("a", "b")
    assert tuned.trainable().keys() == everything
    assert all(p.requires_grad for p in tuned.trainable().values())


def test_base_weights_of_a_frozen_selection_do_not_train(
    model: PreTrainedModel, input_ids: Tensor, loss: Loss
) -> None:
    tuned = attach(attach(model, LastLayer(), name="a"), LoRA(rank=2), name="b")
    tuned.freeze("a")
    loss(model, input_ids).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(tuned.trainable())


def test_a_name_that_is_taken_is_refused_and_nothing_changes(
    tuned: TunedModel, saved: dict[str, Path]
) -> None:
    before = list(tuned.model.state_dict())
    with pytest.raises(MethodError, match="an adapter named 'lora' is already attached"):
        tuned.load_adapter("lora", saved["prompt"])
    assert list(tuned.model.state_dict()) == before


def test_unknown_names_are_refused(tuned: TunedModel, tmp_path: Path) -> None:
    before = [part.attachment.enabled for part in tuned.parts]
    for act in (tuned.use, tuned.remove, tuned.freeze, tuned.unfreeze):
        with pytest.raises(MethodError, match="no adapter is named 'x'; there are"):
            act("x")
    with pytest.raises(MethodError, match="no adapter is named 'x'"):
        tuned.save(tmp_path / "nowhere", "x")
    assert [part.attachment.enabled for part in tuned.parts] == before


def test_an_adapter_of_another_base_is_refused_and_the_others_stay(
    trained: Trained, tmp_path: Path, input_ids: Tensor
) -> None:
    attach(tiny_gpt2(), LoRA(rank=2)).save(tmp_path / "other")
    tuned = trained(attach(tiny_llama(), LoRA(rank=2), name="own"))
    before = tuned.model(input_ids).logits
    with pytest.raises(AdapterError, match="was made on a gpt2 model"):
        tuned.load_adapter("other", tmp_path / "other")
    assert tuned.adapters == ["own"]
    assert torch.equal(tuned.model(input_ids).logits, before)


def test_values_that_do_not_fit_leave_no_half_loaded_adapter(
    trained: Trained, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    attach(tiny_llama(), PTuningV2(length=2)).save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file)
    model = tiny_llama()
    before = list(model.state_dict())
    with pytest.raises(AdapterError, match="missing"):
        TunedModel(model).load_adapter("a", tmp_path / "a")
    assert list(model.state_dict()) == before


def test_nothing_is_removed_from_merged_weights(model: PreTrainedModel) -> None:
    tuned = attach(attach(model, LoRA(rank=2), name="a"), LoRA(rank=2), name="b")
    tuned.merge()
    with pytest.raises(MethodError, match=r"unmerge\(\) before removing"):
        tuned.remove("a")
    with pytest.raises(MethodError, match=r"unmerge\(\) first"):
        tuned.use("a")


def test_a_prefix_is_attached_to_a_model_with_a_prompt(
    model: PreTrainedModel, input_ids: Tensor
) -> None:
    torch.manual_seed(3)
    alone = attach(model, PrefixTuning(length=2))
    expected = {n.replace("default", "b"): t.clone() for n, t in alone.state_dict().items()}
    alone.detach()
    tuned = attach(model, PromptTuning(tokens=3), name="a")
    tuned.freeze("a")
    torch.manual_seed(3)
    attach(tuned, PrefixTuning(length=2), name="b")
    assert all(torch.equal(t, expected[name]) for name, t in tuned.state_dict().items())
