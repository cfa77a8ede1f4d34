"""Saving and loading: equal bits, and every way it can go wrong."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith.errors import AdapterError, CheckpointError, TunesmithError
from tunesmith.methods import Full, LastLayer, LoRA
from tunesmith.methods.contract import Method
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]

METHODS = {
    "lora": LoRA(rank=4),
    "lora, parts of a fused projection": LoRA(rank=2, targets=["attention.q", "attention.v"]),
    "lora, rslora": LoRA(rank=4, alpha=3.5, rslora=True, dropout=0.2),
    "full": Full(),
    "last_layer": LastLayer(),
}


@pytest.fixture
def saved(trained: Trained, tmp_path: Path) -> Path:
    """The directory of an adapter for the tiny Llama that `named` gives."""
    trained(attach(named("org/Tiny"), LoRA(rank=4))).save(tmp_path / "a")
    return tmp_path / "a"


def named(name: str) -> PreTrainedModel:
    """Return the tiny Llama as if it had been loaded by this name."""
    torch.manual_seed(0)
    model = tiny_llama()
    model.name_or_path = name
    return model


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below `directory`."""
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_what_is_loaded_is_what_was_saved_bitwise(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained, tmp_path: Path
) -> None:
    tuned = trained(attach(model, method))
    state, logits = {n: t.clone() for n, t in tuned.state_dict().items()}, model(input_ids).logits
    tuned.save(tmp_path / "a")
    again = load_adapter(tuned.detach(), tmp_path / "a")
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())
    assert torch.equal(model(input_ids).logits, logits)
    assert again.parts[0].method == method
    assert all(p.requires_grad for p in again.trainable().values())


def test_biases_are_saved_bitwise(trained: Trained, tmp_path: Path) -> None:
    tuned = trained(attach(tiny_gpt2().bfloat16(), LoRA(rank=4, bias="all")))
    state = {name: t.clone() for name, t in tuned.state_dict().items()}
    tuned.save(tmp_path / "a")
    again = load_adapter(tuned.detach(), tmp_path / "a")
    assert all(torch.equal(again.state_dict()[name], t) for name, t in state.items())


def test_several_adapters_are_saved_and_loaded_together(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained, tmp_path: Path
) -> None:
    tuned = attach(model, LoRA(rank=4), name="first")
    trained(attach(tuned, LoRA(rank=2), LastLayer(blocks=0), name="second"))
    logits = model(input_ids).logits
    tuned.save(tmp_path / "all")
    again = load_adapter(tuned.detach(), tmp_path / "all")
    assert torch.equal(model(input_ids).logits, logits)
    assert [part.name for part in again.parts] == ["first", "second", "second"]


def test_an_adapter_loads_beside_another_under_a_new_name(saved: Path, input_ids: Tensor) -> None:
    model = named("tiny")
    tuned = load_adapter(model, saved, name="x")
    once = model(input_ids).logits
    load_adapter(tuned, saved, name="y")
    assert not torch.equal(model(input_ids).logits, once)
    tuned.enable(False, "x")
    assert torch.equal(model(input_ids).logits, once)


def test_saving_again_replaces_what_was_there(saved: Path, tmp_path: Path) -> None:
    attach(named("org/Tiny"), LastLayer()).save(saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter_model.safetensors",
        "tunesmith.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_saving_over_other_files_is_refused(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    before = contents(saved)
    with pytest.raises(AdapterError, match=r"holds notes\.txt, which saving .* would delete"):
        attach(named("tiny"), LastLayer()).save(saved)
    assert contents(saved) == before


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(AdapterError, match="is a file"):
        attach(tiny_llama(), LastLayer()).save(tmp_path / "a")


@pytest.mark.parametrize("size", [0, 5000])
@pytest.mark.parametrize("method", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_a_full_disk_leaves_the_old_adapter_intact(
    size: int, method: Method, saved: Path, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    tuned = attach(named("tiny"), method)
    with disk_full_after(size), pytest.raises(CheckpointError, match=r"cannot write .*a: "):
        tuned.save(saved)
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_no_half_model(input_ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama()
    tuned, before = attach(model, LoRA(rank=4)), model(input_ids).logits
    with disk_full_after(5000), pytest.raises(CheckpointError, match="cannot write"):
        tuned.export_model(tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert torch.equal(model(input_ids).logits, before)


def test_a_model_is_not_exported_over_other_files(saved: Path) -> None:
    before = contents(saved)
    with pytest.raises(AdapterError, match="is not empty"):
        attach(tiny_llama(), LoRA(rank=4)).export_model(saved)
    assert contents(saved) == before


def test_only_one_adapter_goes_into_a_peft_directory(tmp_path: Path) -> None:
    tuned = attach(attach(tiny_llama(), LoRA(rank=2)), LoRA(rank=2), name="b")
    with pytest.raises(TunesmithError, match="holds one adapter and this model has 2"):
        tuned.export_peft(tmp_path / "a")


def test_a_method_that_peft_does_not_know_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match="PEFT has no format"):
        attach(tiny_llama(), Full()).export_peft(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_adapter_cannot_be_loaded_under_a_name_that_is_none(saved: Path) -> None:
    model = named("tiny")
    with pytest.raises(TunesmithError, match="cannot name an adapter"):
        load_adapter(model, saved, name="a.b")
    assert all(p.requires_grad for p in model.parameters())


def refused(model: PreTrainedModel, directory: Path, message: str) -> None:
    """Assert that loading is refused so, and that the model is as it was."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, directory)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_for_another_base_is_refused_by_both_names(saved: Path) -> None:
    refused(named("org/Other"), saved, "on the base model 'org/Tiny' and this is 'org/Other'")


def test_the_name_of_the_base_can_be_waived_but_not_its_sizes(saved: Path) -> None:
    load_adapter(named("org/Other"), saved, check_base=False)
    with pytest.raises(AdapterError, match="of other sizes"):
        load_adapter(tiny_llama(hidden_size=64), saved, check_base=False)


@pytest.mark.parametrize("name", ["org/tiny", "/models/Tiny/", "C:\\models\\tiny", "tiny", ""])
def test_the_same_base_by_another_road_is_accepted(name: str, saved: Path) -> None:
    load_adapter(named(name), saved)


def test_another_architecture_is_refused(saved: Path) -> None:
    refused(tiny_gpt2(), saved, "on a llama model of other sizes than this gpt2")


def test_a_truncated_file_is_refused_by_name(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(named("tiny"), saved, r"adapter_model\.safetensors is damaged")


def test_a_file_of_garbage_is_refused_by_name(saved: Path) -> None:
    (saved / "adapter_model.safetensors").write_bytes(b"no tensors at all")
    refused(named("tiny"), saved, r"adapter_model\.safetensors is damaged")


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a saved adapter."""
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


A_TENSOR = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(A_TENSOR), r"up_proj\.lora_B\.weight is missing"),
        (lambda tensors: tensors.update(x=torch.ones(1)), "x is not expected"),
        (lambda tensors: tensors.update({A_TENSOR: torch.ones(48, 3)}), r"has shape \(48, 3\)"),
    ],
    ids=["missing", "unexpected", "other shape"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], message: str, saved: Path
) -> None:
    rewrite(saved, change)
    refused(named("tiny"), saved, message)


def test_a_selection_that_does_not_fit_is_refused(trained: Trained, tmp_path: Path) -> None:
    trained(attach(tiny_llama(), LastLayer())).save(tmp_path / "a")
    rewrite(tmp_path / "a", lambda tensors: tensors.pop("model.norm.weight"))
    refused(tiny_llama(), tmp_path / "a", r"model\.norm\.weight is missing")


def test_values_outside_the_recorded_columns_are_refused(trained: Trained, tmp_path: Path) -> None:
    trained(attach(tiny_gpt2(), LoRA(rank=2, targets=["attention.q"]))).save(tmp_path / "a")
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    rewrite(tmp_path / "a", lambda tensors: tensors[name].fill_(1.0))
    refused(tiny_gpt2(), tmp_path / "a", "acts on output columns")


def test_a_broken_record_is_refused_by_file_and_key(saved: Path) -> None:
    file = saved / "tunesmith.json"
    record = json.loads(file.read_text())
    record["method"]["rank"] = 0
    file.write_text(json.dumps(record))
    refused(named("tiny"), saved, r"tunesmith\.json: method\.lora\.rank: ")
    file.write_text("{")
    refused(named("tiny"), saved, r"tunesmith\.json: the whole file: ")
    file.write_bytes(b"\xff\xfe")
    refused(named("tiny"), saved, r"tunesmith\.json cannot be read")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "holds no adapter: there is no adapter_model.safetensors"),
        ("adapter_model.bin", "as a pickle"),
        ("adapter_model.safetensors", r"neither tunesmith\.json nor adapter_config\.json"),
    ],
)
def test_a_directory_without_an_adapter_is_refused(
    file: str | None, message: str, tmp_path: Path
) -> None:
    if file:
        (tmp_path / file).write_bytes(b"")
    refused(tiny_llama(), tmp_path, message)
    refused(tiny_llama(), tmp_path / "absent", "holds no adapter")
