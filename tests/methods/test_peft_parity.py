"""The installed PEFT as the reference: files both ways, logits, gradients."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith.errors import AdapterError, MethodError, ModelError
from tunesmith.methods import LoRA
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.loading import load_model
from tunesmith.models.output_head import output_head

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")


def peft_adapter(base: PreTrainedModel, directory: Path, **settings: object) -> Tensor:
    """Save a random LoRA made by PEFT; return its logits on the tokens 0 to 9."""
    model = peft.get_peft_model(deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model.eval()(torch.arange(10)[None]).logits


READABLE = {
    "one list": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "regex": {"r": 4, "target_modules": r".*\.1\.self_attn\.[qk]_proj"},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "default targets": {"r": 4},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["down_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"up_proj": 5},
    },
    "one block": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "one block, named": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "excluded": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["up_proj", "q_proj"]},
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "dropout": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.3},
}
READABLE_GPT2 = {
    "fused": {"r": 4, "target_modules": ["c_attn"]},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "one of two so called": {"r": 4, "target_modules": ["attn.c_proj"]},
    "biases": {"r": 4, "target_modules": ["c_attn"], "bias": "all"},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    ("make", "settings"),
    [(tiny_llama, s) for s in READABLE.values()] + [(tiny_gpt2, s) for s in READABLE_GPT2.values()],
    ids=[f"llama {name}" for name in READABLE] + [f"gpt2 {name}" for name in READABLE_GPT2],
)
def test_a_directory_that_peft_saved_gives_pefts_logits(
    make: Callable[[], PreTrainedModel], settings: dict[str, object], tmp_path: Path
) -> None:
    base = make()
    expected = peft_adapter(base, tmp_path / "a", **settings)
    tuned = load_adapter(base, tmp_path / "a")
    logits = base(torch.arange(10)[None]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    # and what is saved again says the same
    tuned.save(tmp_path / "b")
    load_adapter(tuned.detach(), tmp_path / "b")
    assert torch.equal(base(torch.arange(10)[None]).logits, logits)


WRITTEN = {
    "all": LoRA(rank=4),
    "rslora": LoRA(rank=4, alpha=2.5, rslora=True),
    "some": LoRA(rank=2, targets=["attention.o", "mlp.down"]),
}


@pytest.mark.parametrize("method", WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize("save", [TunedModel.save, TunedModel.export_peft])
def test_peft_loads_what_is_saved_here_with_equal_logits(
    save: Callable[[TunedModel, Path], None],
    method: LoRA,
    model: PreTrainedModel,
    trained: Trained,
    input_ids: Tensor,
    tmp_path: Path,
) -> None:
    tuned = trained(attach(model, method))
    expected = model(input_ids).logits
    save(tuned, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tuned.detach(), tmp_path / "a").eval()
    torch.testing.assert_close(loaded(input_ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=4, targets=["attention.q", "attention.v"]), LoRA(rank=4, bias="all")],
    ids=["q and v of a fused projection", "biases"],
)
def test_peft_loads_parts_of_a_fused_projection_and_biases(
    method: LoRA, trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    base = tiny_gpt2()
    tuned = trained(attach(base, method))
    expected = base(input_ids).logits
    tuned.save(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tuned.detach(), tmp_path / "a").eval()
    torch.testing.assert_close(loaded(input_ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_on_the_head_acts_and_is_never_read_past(
    tied: bool, tmp_path: Path, input_ids: Tensor
) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    settings = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(deepcopy(model), settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    expected = theirs(input_ids).logits
    theirs.save_pretrained(tmp_path)
    tuned = load_adapter(model, tmp_path, check_base=False)
    assert torch.equal(tuned.model(input_ids).logits, expected)
    with pytest.raises(ModelError, match=r"an adapter acts on the head of this LlamaForCausalLM"):
        output_head(tuned.model)
    with tuned.disabled():
        assert output_head(tuned.model).weight is model.lm_head.weight
    if tied:
        with pytest.raises(MethodError, match=r"tied to model.embed_tokens.weight"):
            tuned.merge()
        assert torch.equal(tuned.model(input_ids).logits, expected)
        return
    with tuned.merged():
        torch.testing.assert_close(tuned.model(input_ids).logits, expected)


def test_a_peft_directory_holds_pefts_two_files_only(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    attach(model, LoRA(rank=4)).export_peft(tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert not any("tunesmith" in path.name for path in (tmp_path / "a").iterdir())


def test_the_same_pairs_get_pefts_gradients(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor, loss: Loss, tmp_path: Path
) -> None:
    base = deepcopy(model)
    tuned = trained(attach(model, LoRA(rank=4, alpha=6)))
    tuned.save(tmp_path / "a")
    reference = PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True)
    loss(model, input_ids).backward()
    loss(reference, input_ids).backward()
    for name, parameter in tuned.trainable().items():
        path, _, letter = name.partition(".lora_default.")
        theirs = reference.get_parameter(
            f"base_model.model.{path}.lora_{letter}.default.weight"
        ).grad
        torch.testing.assert_close(parameter.grad, theirs)


def test_as_many_parameters_train_as_in_peft(model: PreTrainedModel) -> None:
    reference = peft.get_peft_model(
        deepcopy(model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ours = attach(model, LoRA(rank=4)).parameter_counts()
    assert (ours.trainable, ours.trainable + ours.base) == reference.get_nb_trainable_parameters()


REFUSED = {
    "modules_to_save": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias 'lora_only'": {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only"},
    "trainable_token_indices": {
        "r": 4,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [1, 2],
    },
    "lora_embedding_A": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "init_lora_weights 'olora'": {
        "r": 4,
        "target_modules": ["q_proj"],
        "init_lora_weights": "olora",
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("named", "settings"), REFUSED.items(), ids=REFUSED.keys())
def test_what_is_more_than_plain_lora_is_refused_by_name(
    named: str, settings: dict[str, object], tmp_path: Path
) -> None:
    base = tiny_llama()
    peft_adapter(base, tmp_path / "a", **settings)
    names = list(base.state_dict())
    with pytest.raises(AdapterError, match=named):
        load_adapter(base, tmp_path / "a")
    assert list(base.state_dict()) == names


def test_another_kind_of_peft_adapter_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    model = peft.get_peft_model(deepcopy(base), peft.LoHaConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="'LOHA' cannot be read"):
        load_adapter(base, tmp_path / "a")


def test_a_peft_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    peft_adapter(tiny_gpt2(), tmp_path / "a", r=4, target_modules=["c_attn"])
    with pytest.raises(AdapterError, match="belongs to another model"):
        load_adapter(tiny_llama(), tmp_path / "a")


def test_a_peft_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    peft_adapter(tiny_llama(hidden_size=64), tmp_path / "a", r=4, target_modules=["q_proj"])
    with pytest.raises(
        AdapterError, match=r"lora_A\.weight has shape \(4, 64\) .* needs \(4, 32\)"
    ):
        load_adapter(tiny_llama(), tmp_path / "a")


def test_a_wrong_value_in_adapter_config_is_named(tmp_path: Path) -> None:
    peft_adapter(tiny_llama(), tmp_path / "a", r=4, target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": "many"}))
    with pytest.raises(AdapterError, match=r"adapter_config\.json: r: "):
        load_adapter(tiny_llama(), tmp_path / "a")


def test_names_are_as_short_as_they_can_be_told_apart(tmp_path: Path) -> None:
    method = LoRA(rank=4, targets=["attention.o", "mlp.up"])
    config = attach(tiny_gpt2(), method).attachments[0].export_peft().config
    assert config["target_modules"] == ["attn.c_proj", "c_fc"]
    assert config["fan_in_fan_out"] is True


@pytest.mark.zoo
def test_an_adapter_on_real_weights_gives_pefts_logits_and_merges(
    trained: Trained, tmp_path: Path
) -> None:
    model, tokenizer = load_model("smollm2-135m-instruct", dtype=torch.float32)[:2]
    input_ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    base_logits = model(input_ids).logits
    tuned = attach(model, LoRA())
    assert torch.equal(model(input_ids).logits, base_logits)
    trained(tuned)
    expected = model(input_ids).logits
    tuned.save(tmp_path / "a")
    with tuned.merged():
        # 30 layers, logits up to some tens: float32's relative precision over the sums
        torch.testing.assert_close(model(input_ids).logits, expected, atol=2e-3, rtol=1e-4)
    loaded = PeftModel.from_pretrained(tuned.detach(), tmp_path / "a").eval()
    torch.testing.assert_close(loaded(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
