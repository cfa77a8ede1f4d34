"""Prompt tuning: PEFT as the reference, and the longer sequence nobody outside must notice."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, PromptTuningConfig
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILIES
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods import PromptTuning
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.attention import enable_segments

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

METHOD = PromptTuning(tokens=4)


def test_logits_and_gradients_are_pefts(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    base = deepcopy(model)
    tuned = trained(attach(model, METHOD))
    tuned.save(tmp_path / "a")
    loaded = PeftModel.from_pretrained(deepcopy(base), tmp_path / "a").eval()
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    reference = peft.get_peft_model(base, config).eval()  # PEFT loads prompts frozen
    reference.prompt_encoder.default.load_state_dict(loaded.prompt_encoder.default.state_dict())
    ours = model(input_ids, labels=input_ids)
    theirs = reference(input_ids=input_ids, labels=input_ids)
    # PEFT's logits have the prompt's rows in front
    torch.testing.assert_close(ours.logits, theirs.logits[:, 4:], atol=1e-5, rtol=1e-5)
    # PEFT also predicts the first token from the prompt's last row, so compare what both sum
    for logits in (ours.logits, theirs.logits[:, 4:]):
        logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).sum().backward()
    gradient = reference.prompt_encoder.default.embedding.weight.grad
    torch.testing.assert_close(tuned.attachments[0].prompt.P.grad, gradient)


def test_a_directory_that_peft_saved_gives_pefts_logits(
    model: PreTrainedModel, input_ids: Tensor, tmp_path: Path
) -> None:
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    reference = peft.get_peft_model(deepcopy(model), config).eval()
    reference.save_pretrained(tmp_path / "a")
    load_adapter(model, tmp_path / "a")
    expected = reference(input_ids=input_ids).logits[:, 5:]
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_logits_are_those_of_the_embeddings_put_together(
    model: PreTrainedModel, input_ids: Tensor
) -> None:
    tuned = attach(model, METHOD)
    logits = model(input_ids, output_hidden_states=True)
    with tuned.disabled():
        P = tuned.attachments[0].prompt.P.expand(2, -1, -1)
        embeds = torch.cat([P, model.get_input_embeddings()(input_ids)], dim=1)
        plain = model(inputs_embeds=embeds, output_hidden_states=True)
    assert torch.equal(logits.logits, plain.logits[:, 4:])
    assert all(h.shape[1] == 7 for h in logits.hidden_states)


def test_off_and_detached_is_the_base_bitwise(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor
) -> None:
    before, keys = model(input_ids).logits, list(model.state_dict())
    tuned = trained(attach(model, METHOD))
    assert not torch.equal(model(input_ids).logits, before)
    with tuned.disabled():
        assert torch.equal(model(input_ids).logits, before)
    tuned.detach()
    assert torch.equal(model(input_ids).logits, before)
    assert list(model.state_dict()) == keys
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_only_the_prompt_trains(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor, loss: Loss
) -> None:
    tuned = trained(attach(model, METHOD))
    loss(model, input_ids).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(tuned.trainable())
    assert tuned.parameter_counts().trainable == 4 * 32


def test_what_is_loaded_is_what_was_saved_bitwise(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    tuned = trained(attach(model, METHOD))
    logits = model(input_ids).logits
    tuned.save(tmp_path / "a")
    again = load_adapter(tuned.detach(), tmp_path / "a")
    assert torch.equal(model(input_ids).logits, logits)
    assert again.parts[0].method == METHOD
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name: t.shape for name, t in stored.items()} == {"prompt_embeddings": (4, 32)}


def test_merging_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(MethodError, match="adds input and changes no weight"):
        attach(model, METHOD).merge()


def test_gradient_checkpointing_gives_equal_gradients(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor, loss: Loss
) -> None:
    P = trained(attach(model.train(), METHOD)).attachments[0].prompt.P
    loss(model, input_ids).backward()
    plain = P.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss(model, input_ids).backward()
    torch.testing.assert_close(P.grad, plain)


def test_left_padding_changes_nothing(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor
) -> None:
    trained(attach(model, METHOD))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.full((2, 3), 2), input_ids], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(input_ids).logits, atol=1e-5, rtol=1e-5)


WINDOWED = pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])


def padded_to(length: int, row: Tensor) -> tuple[Tensor, Tensor]:
    """`row` (1, tokens) with padding on its left, and the mask."""
    padding = length - row.shape[1]
    ids = torch.cat([row.new_full((1, padding), 2), row], dim=1)
    return ids, (torch.arange(length)[None] >= padding).long()


@WINDOWED
def test_left_padding_moves_no_row_out_of_a_sliding_window(family: str, trained: Trained) -> None:
    model = FAMILIES[family].make()  # of a window of 4
    tuned = trained(attach(model, METHOD))
    P = tuned.attachments[0].prompt.P
    rows = [torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9, 10, 11, 12, 13]])]
    ids, mask = (torch.cat(x) for x in zip(*(padded_to(9, row) for row in rows), strict=True))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    out.logits[mask.bool()].square().sum().backward()
    found, P.grad = P.grad, None
    for i, row in enumerate(rows):
        alone = model(row, output_hidden_states=True)
        alone.logits.square().sum().backward()
        n = row.shape[1]
        torch.testing.assert_close(out.logits[i, -n:], alone.logits[0], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(out.hidden_states, alone.hidden_states, strict=True):
            assert ours.shape == (2, 9, 32)
            torch.testing.assert_close(ours[i, -n:], theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, P.grad, atol=1e-4, rtol=1e-4)


@WINDOWED
@pytest.mark.parametrize("beams", [1, 2])
def test_left_padded_generation_under_a_sliding_window_is_each_rows_own(
    beams: int, family: str, trained: Trained
) -> None:
    model = FAMILIES[family].make()
    tuned = trained(attach(model, METHOD, name="a"))
    trained(attach(tuned, PromptTuning(tokens=2), name="b"))
    rows = [torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9, 10, 11, 12, 13]])]
    ids, mask = (torch.cat(x) for x in zip(*(padded_to(9, row) for row in rows), strict=True))
    settings = {"do_sample": False, "max_new_tokens": 8, "num_beams": beams}
    found = model.generate(ids, attention_mask=mask, **settings)
    for row, own in zip(rows, found, strict=True):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **settings)
        assert torch.equal(own[9:], alone[0, row.shape[1] :])


def test_every_packed_segment_has_the_prompt_before_it(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor
) -> None:
    trained(attach(model, METHOD))
    parts = [input_ids[:1, :3], input_ids[1:, :1], input_ids[1:, 2:]]
    alone = torch.cat([model(part).logits for part in parts], dim=1)
    assert enable_segments(model)
    bounds = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    packed = model(
        torch.cat(parts, dim=1),
        position_ids=torch.cat([torch.arange(p.shape[1]) for p in parts])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=5,
        max_length_k=5,
    ).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_the_cache_is_the_one_without(
    beams: int, model: PreTrainedModel, trained: Trained, input_ids: Tensor
) -> None:
    trained(attach(model, METHOD))
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 20, "num_beams": beams}
    cached = model.generate(input_ids, do_sample=False, **settings)
    plain = model.generate(input_ids, do_sample=False, use_cache=False, **settings)
    assert torch.equal(cached, plain)
    alone = model.generate(input_ids[:1, 3:], do_sample=False, max_new_tokens=20, num_beams=beams)
    assert torch.equal(cached[:1, 7:], alone[:, 4:])


def test_a_static_cache_is_refused(input_ids: Tensor) -> None:
    model = tiny_llama()
    attach(model, METHOD)
    with pytest.raises(MethodError, match="dynamic cache"):
        model.generate(input_ids, max_new_tokens=2, cache_implementation="static")


def test_two_prompts_follow_each_other_and_either_is_undone(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor
) -> None:
    tuned = trained(attach(model, METHOD, name="a"))
    once = model(input_ids).logits
    attach(tuned, PromptTuning(tokens=3), name="b")
    first, second = (attachment.prompt.P for attachment in tuned.attachments)
    both = model(input_ids).logits
    assert both.shape == once.shape
    with tuned.disabled():
        rows = torch.cat([second, first]).expand(2, -1, -1)
        embeds = torch.cat([rows, model.get_input_embeddings()(input_ids)], dim=1)
        expected = model(inputs_embeds=embeds).logits[:, 7:]
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)
    tuned.enable(False, "b")
    assert torch.equal(model(input_ids).logits, once)


def test_a_bfloat16_base_trains_a_float32_prompt(input_ids: Tensor, loss: Loss) -> None:
    model = tiny_llama().bfloat16()
    P = attach(model, METHOD).attachments[0].prompt.P
    optimizer = torch.optim.AdamW([P], lr=0.1)
    before = loss(model, input_ids)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, input_ids).backward()
        optimizer.step()
    assert P.dtype == P.grad.dtype == torch.float32
    assert loss(model, input_ids) < before


def test_a_vocabulary_start_is_rows_of_the_embedding() -> None:
    model = tiny_llama()
    rows = attach(model, METHOD).attachments[0].prompt.P
    embedding = model.get_input_embeddings().weight
    assert all(any(torch.equal(row, token) for token in embedding) for row in rows)


def test_a_random_start_is_uniform() -> None:
    rows = attach(tiny_llama(), PromptTuning(tokens=200, init="random")).attachments[0].prompt.P
    assert rows.abs().max() <= 0.5
    assert rows.std().item() == pytest.approx(12**-0.5, rel=0.05)  # 6,400 samples


def test_a_text_start_is_the_texts_tokens_repeated(tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    tokenizer.save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    tuned = attach(model, PromptTuning(tokens=5, init="text", text="ab"))
    a, b = tokenizer("ab").input_ids
    embedding = model.get_input_embeddings().weight
    assert torch.equal(tuned.attachments[0].prompt.P, embedding[[a, b, a, b, a]])
    nearest = tuned.attachments[0].nearest_tokens(1)
    assert [token for ((token, _),) in nearest] == [a, b, a, b, a]
    assert nearest[0][0][1] == pytest.approx(1.0)


def test_a_text_start_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.name_or_path = str(tmp_path)
    with pytest.raises(MethodError, match=r"method\.init: text needs the tokenizer"):
        attach(model, PromptTuning(init="text", text="sort it"))


def test_a_prompt_as_long_as_the_context_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(MethodError, match=r"method\.tokens: 256 rows .* context of 256"):
        attach(model, PromptTuning(tokens=256))


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"init": "text"}, {"text": "x"}])
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PromptTuning.model_validate(wrong)


def test_a_prompt_of_another_width_is_refused(tmp_path: Path) -> None:
    attach(tiny_llama(hidden_size=64), METHOD).export_peft(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"shape \(4, 64\) .* needs \(4, 32\)"):
        load_adapter(tiny_gpt2(), tmp_path / "a")
