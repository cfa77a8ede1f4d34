"""A classifier's head beside every method: trained, switched, saved, and never lost in silence."""

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import tunesmith
from classifiers import CONFIGS
from tunesmith import IA3, Adapter, BitFit, Full, LastLayer, LoRA, PromptTuning, attach
from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods.contract import Method
from tunesmith.methods.head import HeadAttachment
from tunesmith.methods.tuned import TunedModel
from tunesmith.models.heads import head_logits, head_paths

METHODS: list[Method] = [
    LoRA(rank=4),
    LoRA(rank=4, bias="all"),
    IA3(),
    Adapter(),
    BitFit(),
    PromptTuning(tokens=3),
    LastLayer(blocks=1),
    LastLayer(blocks=0, norm=False, head=True),
    Full(),
]
IDS = {
    "input_ids": torch.tensor([[1, 44, 60, 7, 2, 9], [1, 5, 2, 2, 2, 2]]),
    "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]),
}


def classifier(
    family: str, *, seed: int = 0, labels: tuple[str, ...] = ("x", "y", "z")
) -> PreTrainedModel:
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "num_labels": len(labels)}
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | names)
    return AutoModelForSequenceClassification.from_config(config).eval()


def with_another_head(start: dict[str, torch.Tensor], family: str) -> PreTrainedModel:
    """The base of `start` with a head of its own, as it is when it is loaded again."""
    other = classifier(family, seed=9)
    own, heads = other.state_dict(), head_paths(other)
    mixed = {n: own[n] if n.startswith(heads) else value for n, value in start.items()}
    other.load_state_dict(mixed)
    return other


def trained(tuned: TunedModel) -> TunedModel:
    """Every trainable moved somewhere else."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return tuned


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return head_logits(model, IDS)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_whole_head_trains_once_in_float32_with_every_method(
    family: str, method: Method
) -> None:
    model = classifier(family).bfloat16()
    heads = [n for n, _ in model.named_parameters() if n.startswith(("bert.pooler.", "classifier"))]
    tuned = attach(model, method)
    trainable = tuned.trainable()
    assert set(heads) <= set(trainable)
    assert all(trainable[name].dtype == torch.float32 for name in heads)
    assert len({id(parameter) for parameter in trainable.values()}) == len(trainable)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trainable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_new_lora_leaves_the_logits_of_the_same_head_alone(
    family: str, dtype: torch.dtype
) -> None:
    model = classifier(family).to(dtype)
    tuned = attach(model, LoRA(rank=4))
    on = logits(model)
    with tuned.disabled():
        assert torch.equal(logits(model), on)
    trained(tuned)
    with tuned.disabled():
        assert torch.equal(logits(model), on)
    assert not torch.allclose(logits(model), on)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_detaching_gives_the_plain_model_back(family: str) -> None:
    model = classifier(family).bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits(model)
    trained(attach(model, LoRA(rank=4))).detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.dtype == torch.bfloat16 for value in model.state_dict().values())
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", METHODS[:-1], ids=lambda m: m.name)
def test_a_saved_head_comes_back_on_a_base_with_another(
    tmp_path: Path, family: str, method: Method
) -> None:
    model = classifier(family)
    without_biases = family in {"llama", "modernbert"}
    if without_biases and isinstance(method, BitFit):
        method = BitFit(add_missing=True)
    if without_biases and isinstance(method, LoRA):
        method = LoRA(rank=4)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = trained(attach(model, method))
    tuned.save(tmp_path / "adapter")
    other = with_another_head(start, family)
    again = tunesmith.load_adapter(other, tmp_path / "adapter")
    one, two = tuned.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("family", CONFIGS)
def test_peft_loads_the_head_with_the_adapter(tmp_path: Path, family: str) -> None:
    model = classifier(family)
    model.config.pad_token_id = None
    tuned = attach(model, LoRA(rank=4))
    trained(tuned)
    tuned.export_peft(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    other = with_another_head(classifier(family).state_dict(), family)
    other.config.pad_token_id = None
    theirs = PeftModel.from_pretrained(other, tmp_path).eval()
    one = IDS["input_ids"][:1]
    with torch.no_grad():
        expected = theirs(one).logits
        ours = head_logits(model, {"input_ids": one})
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_a_classifier_that_peft_saved_is_read(tmp_path: Path, family: str) -> None:
    targets = {"bert": ["query", "value"], "distilbert": ["q_lin"], "llama": ["q_proj", "v_proj"]}
    base = classifier(family)
    base.config.pad_token_id = None
    saved = ["pre_classifier", "classifier"] if family == "distilbert" else None
    settings = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=targets[family], modules_to_save=saved
    )
    theirs = get_peft_model(base, settings).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    other = classifier(family)
    tunesmith.load_adapter(other, tmp_path)
    one = IDS["input_ids"][:1]
    with torch.no_grad():
        expected = theirs(one).logits
        ours = head_logits(other, {"input_ids": one})
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_head_has_no_place_on_a_language_model(tmp_path: Path) -> None:
    attach(classifier("llama"), LoRA(rank=4)).save(tmp_path)
    config = CONFIGS["llama"]
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(AdapterError, match=r"holds a classification head for the labels x, y, z"):
        tunesmith.load_adapter(model, tmp_path)


def test_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    attach(classifier("bert"), LoRA(rank=4)).save(tmp_path)
    with pytest.raises(AdapterError, match=r"made for the labels x, y, z, and this model has z"):
        tunesmith.load_adapter(classifier("bert", labels=("z", "y", "x")), tmp_path)


def test_a_head_for_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    attach(classifier("bert"), LoRA(rank=4)).save(tmp_path)
    with pytest.raises(AdapterError, match=r"classifier.* has shape \(3"):
        tunesmith.load_adapter(classifier("bert", labels=("x", "y")), tmp_path)


def test_an_adapter_without_a_head_says_so_on_a_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    language = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    attach(language, LoRA(rank=4)).save(tmp_path)
    with caplog.at_level(logging.WARNING):
        tunesmith.load_adapter(classifier("llama"), tmp_path)
    assert "holds no classification head" in caplog.text


def test_a_second_adapter_leaves_the_head_to_the_first() -> None:
    tuned = attach(classifier("bert"), LoRA(rank=4), name="one")
    attach(tuned, LoRA(rank=2), name="two")
    heads = [p for p in tuned.parts if isinstance(p.attachment, HeadAttachment)]
    assert [part.name for part in heads] == ["one"]


@pytest.fixture
def two(tmp_path: Path) -> dict[str | None, torch.Tensor]:
    """Logits of the base and of two adapters with a head each, which are saved by their names."""
    found: dict[str | None, torch.Tensor] = {None: logits(classifier("llama"))}
    for name, rank in (("one", 2), ("two", 4)):
        tuned = trained(attach(classifier("llama"), LoRA(rank=rank), name=name))
        found[name] = logits(tuned.model)
        tuned.save(tmp_path / name)
    return found


def test_each_of_several_adapters_has_its_own_head(
    tmp_path: Path, two: dict[str | None, torch.Tensor]
) -> None:
    tuned = tunesmith.load_adapter(classifier("llama"), tmp_path / "one", trainable=False)
    tuned.load_adapter(None, tmp_path / "two", trainable=False)
    for name in ("one", "two", "one", None, "two", "two", None, "one"):
        tuned.use(name)
        assert torch.equal(logits(tuned.model), two[name])
    with pytest.raises(MethodError, match=r"score.weight, where only one of them can act"):
        tuned.enable(True, "two")
    assert torch.equal(logits(tuned.model), two["one"])
    tuned.save(tmp_path / "both")
    again = tunesmith.load_adapter(tuned.detach(), tmp_path / "both", trainable=False)
    assert torch.equal(logits(again.detach()), two[None])


def test_a_head_comes_back_where_the_one_in_its_place_is_removed(
    tmp_path: Path, two: dict[str | None, torch.Tensor]
) -> None:
    tuned = tunesmith.load_adapter(classifier("llama"), tmp_path / "one", trainable=False)
    tuned.load_adapter("two", tmp_path / "two")
    tuned.remove("two")
    assert torch.equal(logits(tuned.model), two["one"])


def test_a_new_head_starts_as_the_frozen_one_and_leaves_it_alone(
    tmp_path: Path, two: dict[str | None, torch.Tensor]
) -> None:
    tuned = tunesmith.load_adapter(classifier("llama"), tmp_path / "one", trainable=False)
    attach(tuned, LoRA(rank=1), name="new")
    assert torch.equal(logits(tuned.model), two["one"])
    trained(tuned)
    tuned.use("one")
    assert torch.equal(logits(tuned.model), two["one"])
