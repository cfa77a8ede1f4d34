"""Methods on encoder-decoders: prefixes in three places, prompts, and PEFT as the reference."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from tiny import tiny_bart, tiny_llama, tiny_t5
from tunesmith.errors import AdapterError, DataError, MethodError
from tunesmith.measure.choices import choice_log_probs
from tunesmith.methods import (
    IA3,
    LlamaAdapter,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
)
from tunesmith.methods.contract import Method
from tunesmith.methods.prefix import Prefix
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.attention_layers import attention_layers

Trained = Callable[[TunedModel], TunedModel]

models = pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
PLACES = ("encoder", "decoder", "cross")
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 2, 2]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "decoder_input_ids": torch.tensor([[2, 20, 21, 22], [2, 23, 24, 25]]),
}


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**BATCH | inputs).logits


def with_plain_attention(
    model: PreTrainedModel, prefixes: dict[nn.Module, Prefix]
) -> PreTrainedModel:
    """Give `model` attention written out: softmax(q [K; k]^T + [0; bias + mask]) [V; v]."""

    def plain(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
    ) -> tuple[Tensor, None]:
        scores = query @ key.transpose(2, 3) * kw["scaling"]
        for added in (kw.get("position_bias"), mask):
            scores = scores if added is None else scores + added
        if module in prefixes:
            K, V = (x[None] for x in (prefixes[module].K, prefixes[module].V))
            scores = torch.cat([query @ K.transpose(2, 3) * kw["scaling"], scores], dim=3)
            value = torch.cat([V.expand(len(value), -1, -1, -1), value], dim=2)
        return (F.softmax(scores, dim=-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("plain", plain)
    AttentionMaskInterface.register("plain", eager_mask)
    model.set_attn_implementation("plain")
    return model


@models
@pytest.mark.parametrize("places", ["all", *([place] for place in PLACES)], ids=str)
def test_a_prefix_is_keys_and_values_in_front_in_each_place(
    make: Callable[[], PreTrainedModel], places: Any, trained: Trained
) -> None:
    base = make()
    tuned = trained(attach(deepcopy(base), PrefixTuning(length=3, places=places)))
    ours = logits(tuned.model)
    found = torch.autograd.grad(ours.square().mean(), list(tuned.trainable().values()))
    paths = {
        path.rpartition(".")[0]: child
        for part in tuned.parts
        for path, child in part.attachment.children.items()
        if isinstance(child, Prefix)
    }
    prefixes = {base.get_submodule(path): child for path, child in paths.items()}
    expected = logits(with_plain_attention(base, prefixes))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    own = [p for child in paths.values() for p in child.parameters()]
    reference = torch.autograd.grad(expected.square().mean(), own)
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-3)
    layers = attention_layers(tuned.model, tuned.sites)
    asked = {layer.place for layer in layers if layer.path in paths}
    assert asked == (set(PLACES) if places == "all" else set(places))


@models
@pytest.mark.parametrize(
    ("method", "number"),
    [
        (PrefixTuning(length=3), 6),
        (PrefixTuning(length=3, reparametrise=True, hidden=8), 6),
        (PTuningV2(length=3), 4),
        (LlamaAdapter(length=3, layers=2), 2),
    ],
    ids=["prefix_tuning", "reparametrised", "p_tuning_v2", "llama_adapter"],
)
def test_each_method_has_its_places(
    make: Callable[[], PreTrainedModel], method: Method, number: int
) -> None:
    (part,) = attach(make(), method).parts
    layers = [path for path in part.attachment.children if "ttention" in path or "attn" in path]
    assert len(layers) == number


def test_a_place_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(MethodError, match=r"method\.places: a llama has no attention in the place"):
        attach(tiny_llama(), PrefixTuning(places=["cross"]))


@models
def test_a_prefix_of_the_models_own_keys_continues_the_text(
    make: Callable[[], PreTrainedModel],
) -> None:
    # What starts as the cross attention's keys of all that is read, and is read again, is no change
    # to a softmax that sees everything twice.
    model = make()
    read = torch.tensor([[5, 6, 7]])
    written = torch.tensor([[2, 20]])
    base = model(input_ids=read, decoder_input_ids=written).logits
    tuned = attach(model, PrefixTuning(length=3, places=["cross"], init="random"))
    encoded = model.get_encoder()(input_ids=read).last_hidden_state
    for layer in attention_layers(model, tuned.sites):
        if layer.place == "cross":
            attention = model.get_submodule(layer.path)
            k, v = (getattr(attention, n, None) or getattr(attention, f"{n}_proj") for n in "kv")
            child = attention.prefix_tuning_default
            with torch.no_grad():
                for parameter, projection in ((child.K, k), (child.V, v)):
                    heads = projection(encoded)[0].unflatten(1, (layer.kv_heads, -1))
                    parameter.copy_(heads.transpose(0, 1))
    torch.testing.assert_close(
        model(input_ids=read, decoder_input_ids=written).logits, base, atol=1e-4, rtol=1e-4
    )


@models
def test_pefts_prefix_has_one_place_and_is_refused(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    tuned = attach(make(), PrefixTuning(length=3))
    with pytest.raises(MethodError, match=r"decoder's self-attention only, .* use save"):
        tuned.export_peft(tmp_path / "a")
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    peft.get_peft_model(make(), config).save_pretrained(tmp_path / "b")
    with pytest.raises(AdapterError, match="decoder's self-attention only"):
        load_adapter(make(), tmp_path / "b")


@models
def test_a_prompt_goes_before_what_the_encoder_reads(
    make: Callable[[], PreTrainedModel], trained: Trained
) -> None:
    base = make()
    tuned = trained(attach(deepcopy(base), PromptTuning(tokens=4)))
    (P,) = tuned.trainable().values()
    embeds = base.get_input_embeddings()(BATCH["input_ids"])
    ones = BATCH["attention_mask"].new_ones(2, 4)
    expected = base(
        inputs_embeds=torch.cat([P.expand(2, -1, -1), embeds], dim=1),
        attention_mask=torch.cat([ones, BATCH["attention_mask"]], dim=1),
        decoder_input_ids=BATCH["decoder_input_ids"],
    ).logits
    ours = logits(tuned.model)
    torch.testing.assert_close(ours, expected)
    found, reference = (torch.autograd.grad(x.square().mean(), P) for x in (ours, expected))
    torch.testing.assert_close(found, reference)


METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4),
    "dora": LoRA(rank=4, dora=True),
    "ia3": IA3(),
    "prompt_tuning": PromptTuning(tokens=4),
}


def test_a_prompt_stands_behind_the_padding_of_what_the_encoder_reads(trained: Trained) -> None:
    model = tiny_t5()  # counts distances by columns
    trained(attach(model, PromptTuning(tokens=3)))
    tokens = torch.tensor([[10, 11, 12]])
    padded = {
        "input_ids": F.pad(tokens, (4, 0), value=2),
        "attention_mask": torch.tensor([[0, 0, 0, 0, 1, 1, 1]]),
        "decoder_input_ids": BATCH["decoder_input_ids"][:1],
    }
    alone = padded | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    torch.testing.assert_close(model(**padded).logits, model(**alone).logits)
    options = {"do_sample": False, "max_new_tokens": 6}
    inputs = ("input_ids", "attention_mask")
    found = model.generate(**{name: padded[name] for name in inputs}, **options)
    assert torch.equal(found, model.generate(**{name: alone[name] for name in inputs}, **options))


@models
@pytest.mark.parametrize("name", METHODS)
def test_peft_loads_what_is_exported_with_equal_logits(
    make: Callable[[], PreTrainedModel], name: str, tmp_path: Path, trained: Trained
) -> None:
    base = make()
    tuned = trained(attach(deepcopy(base), METHODS[name]))
    tuned.export_peft(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    assert theirs.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    torch.testing.assert_close(logits(theirs), logits(tuned.model), atol=1e-5, rtol=1e-5)


CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": lambda **kw: peft.LoraConfig(r=4, init_lora_weights=False, **kw),
    "ia3": lambda **kw: peft.IA3Config(init_ia3_weights=False, **kw),
    "prompt_tuning": lambda **kw: peft.PromptTuningConfig(num_virtual_tokens=4, **kw),
    "one prompt": lambda **kw: peft.PromptTuningConfig(
        num_virtual_tokens=4, num_transformer_submodules=1, **kw
    ),
}


@models
@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saved_gives_pefts_logits(
    make: Callable[[], PreTrainedModel], name: str, tmp_path: Path
) -> None:
    base = make()
    config = CONFIGS[name](task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    expected = logits(theirs)
    assert not torch.allclose(expected, logits(base))
    tuned = load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(logits(tuned.model), expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_for_two_stacks_is_refused_by_a_model_of_one(tmp_path: Path) -> None:
    config = CONFIGS["prompt_tuning"](task_type="SEQ_2_SEQ_LM", token_dim=32)
    peft.get_peft_model(tiny_t5(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="num_transformer_submodules 2 is for encoder-decoder"):
        load_adapter(tiny_llama(), tmp_path / "a")


@models
@pytest.mark.parametrize("method", [LoRA(rank=4), PromptTuning(tokens=3), PrefixTuning(length=3)])
def test_choices_score_as_in_a_plain_forward(
    make: Callable[[], PreTrainedModel], method: Method, trained: Trained
) -> None:
    model = trained(attach(make(), method)).model
    prompts, choices = [[5, 6, 7], [8], [9, 10, 11, 12]], [[20, 21, 2], [22, 2], [20, 2]]

    def plain(prompt: list[int], choice: list[int]) -> Tensor:
        inputs = {"input_ids": prompt, "decoder_input_ids": [2, *choice[:-1]]}
        out = model(**{key: torch.tensor([ids]) for key, ids in inputs.items()}).logits[0]
        return out.log_softmax(-1).gather(-1, torch.tensor(choice)[:, None]).sum()

    expected = torch.stack([torch.stack([plain(p, c) for c in choices]) for p in prompts])
    found = choice_log_probs(model, prompts, choices, batch_size=2)
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-5)


def test_a_choice_longer_than_the_context_is_refused() -> None:
    with pytest.raises(DataError, match="longest choice has 9"):
        choice_log_probs(tiny_bart(max_position_embeddings=8), [[5]], [[6] * 9])
