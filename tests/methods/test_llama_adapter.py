"""LLaMA-Adapter: PEFT and the paper's formula as references."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from families import DECODERS, VOCAB
from tunesmith.errors import MethodError
from tunesmith.methods import LlamaAdapter
from tunesmith.methods.llama_adapter import GatedPrompt
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def pairs(tuned: TunedModel) -> list[GatedPrompt]:
    return list(tuned.attachments[0].children.values())


def test_pefts_weights_give_pefts_logits_and_gradients(trained: Trained) -> None:
    base = DECODERS["llama"]()
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    reference = peft.get_peft_model(deepcopy(base), config)
    tuned = trained(attach(base, LlamaAdapter(length=3, layers=2)))
    layers = [layer.self_attn for layer in reference.base_model.model.model.layers]
    with torch.no_grad():
        for i, (ours, theirs) in enumerate(zip(pairs(tuned), layers, strict=True)):
            ours.g.fill_(0.7 - i)  # PEFT has one gate a layer, and no tanh
            theirs.adaption_gate.copy_(torch.tanh(ours.g[:1]))
            theirs.adaption_prompt.copy_(ours.P[None])
    torch.testing.assert_close(base(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)
    base(IDS, labels=IDS).loss.backward()
    reference(IDS, labels=IDS).loss.backward()
    for ours, theirs in zip(pairs(tuned), layers, strict=True):
        torch.testing.assert_close(ours.P.grad, theirs.adaption_prompt.grad[0])
        slope = 1 - torch.tanh(ours.g.detach()) ** 2
        torch.testing.assert_close((ours.g.grad / slope).sum()[None], theirs.adaption_gate.grad)


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_pefts_files_go_both_ways(who: str, trained: Trained, tmp_path: Path) -> None:
    base = DECODERS["llama"]()
    if who == "ours":
        tuned = trained(attach(deepcopy(base), LlamaAdapter(length=3, layers=2, gate="layer")))
        tuned.export_peft(tmp_path)
        reference = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    else:
        config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
        reference = peft.get_peft_model(deepcopy(base), config)
        with torch.no_grad():
            for layer in reference.base_model.model.model.layers:
                layer.self_attn.adaption_gate.fill_(1.7)  # no tanh of anything
        reference.save_pretrained(tmp_path)
        tuned = load_adapter(deepcopy(base), tmp_path)
    expected = reference(IDS).logits
    assert not torch.allclose(expected, base(IDS).logits, atol=1e-3)
    torch.testing.assert_close(tuned.model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_what_peft_does_not_compute_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="one plain gate a layer"):
        attach(DECODERS["llama"](), LlamaAdapter(layers=1)).export_peft(tmp_path / "a")
    with pytest.raises(MethodError, match="not on a gpt2"):
        attach(DECODERS["gpt2"](), LlamaAdapter(layers=1, gate="layer")).export_peft(tmp_path / "b")


def heads(x: Tensor, count: int) -> Tensor:
    """(1, length, count * head_dim) to (1, 4 heads, length, head_dim)."""
    x = x.view(1, x.shape[1], count, -1).transpose(1, 2)
    return x.repeat_interleave(4 // count, dim=1)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox", "phi3"])
def test_the_papers_formula_with_each_way_to_make_keys(family: str, trained: Trained) -> None:
    model = DECODERS[family]()
    tuned = trained(attach(model, LlamaAdapter(length=3, layers=1)))
    ((path, child),) = tuned.attachments[0].children.items()
    attention = model.get_submodule(path.rpartition(".")[0])
    P = child.P.detach()[None]
    if family == "qwen3":  # keys have a norm of their own
        k = attention.k_norm(attention.k_proj(P).view(1, 3, 2, 16)).flatten(2)
        K, V = heads(k, 2), heads(attention.v_proj(P), 2)
    elif family == "gpt2":
        _, k, v = attention.c_attn(P).chunk(3, dim=-1)
        K, V = heads(k, 4), heads(v, 4)
    elif family == "gpt_neox":
        _, k, v = attention.query_key_value(P).view(1, 3, 4, 24).chunk(3, dim=-1)
        K, V = heads(k.flatten(2), 4), heads(v.flatten(2), 4)
    else:
        _, k, v = attention.qkv_proj(P).split([32, 16, 16], dim=-1)
        K, V = heads(k, 2), heads(v, 2)
    query = torch.randn(1, 4, 5, K.shape[-1])
    got = child.key_values(attention, query)
    groups = 4 // got[0].shape[1]
    expected = (x.double() for x in (K, V))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.repeat_interleave(groups, dim=1).double(), theirs)


def test_the_attentions_output_gains_the_gated_softmax_over_the_prompts(trained: Trained) -> None:
    model = DECODERS["llama"]().double()
    tuned = trained(attach(model, LlamaAdapter(length=3, layers=1)))
    child = pairs(tuned)[0].double()
    attention, seen = model.model.layers[1].self_attn, {}
    attention.o_proj.register_forward_pre_hook(
        lambda _module, args: seen.setdefault(tuned.attachments[0].enabled, args[0].detach())
    )
    attention.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(IDS)
    with tuned.disabled():
        model(IDS)
    q = attention.q_proj(seen["hidden_states"]).view(2, 7, 4, 8).transpose(1, 2)
    cos, sin = (x.unsqueeze(1) for x in seen["position_embeddings"])
    q = q * cos + torch.cat([-q[..., 4:], q[..., :4]], dim=-1) * sin
    K, V = (heads(proj(child.P[None]), 2) for proj in (attention.k_proj, attention.v_proj))
    weights = (q @ K.transpose(-1, -2) / 8**0.5).softmax(-1)
    extra = (torch.tanh(child.g)[:, None, None] * (weights @ V)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[True], seen[False] + extra)


def test_llama_7b_has_1_2_million() -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts = attach(model, LlamaAdapter()).parameter_counts()
    assert counts.trainable == 30 * (10 * 4096 + 32)
    assert round(counts.trainable / 1e6, 1) == 1.2


def test_only_the_top_layers_have_prompts() -> None:
    tuned = attach(DECODERS["llama"](), LlamaAdapter(layers=1))
    assert all(".layers.1." in name for name in tuned.trainable())
    assert len(attach(DECODERS["llama"](), LlamaAdapter()).trainable()) == 2


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(MethodError, match=r"method\.layers: 3 is more than the 2 layers"):
        attach(DECODERS["llama"](), LlamaAdapter(layers=3))


def test_the_first_step_moves_the_gates_only() -> None:
    tuned = attach(DECODERS["llama"](), LlamaAdapter(layers=2))
    tuned.model(IDS, labels=IDS).loss.backward()
    for name, parameter in tuned.trainable().items():
        assert bool(parameter.grad.any()) == name.endswith(".g")


def test_a_gated_prompt_is_a_module_of_the_layer() -> None:
    model: PreTrainedModel = DECODERS["opt"]()
    attach(model, LlamaAdapter(layers=1))
    child: nn.Module = model.model.decoder.layers[1].self_attn.llama_adapter_default
    assert [tuple(p.shape) for p in child.parameters()] == [(10, 32), (4,)]
