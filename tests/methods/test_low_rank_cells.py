"""The low-rank family on both kinds of projection: what every method must keep true."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import tiny_llama
from tunesmith.methods import AdaLoRA, LoRA, VeRA
from tunesmith.methods.contract import Method
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

SOME = ["attention.q", "attention.v", "mlp.down"]
METHODS = {
    "dora": LoRA(rank=4, dora=True),
    "dora, some": LoRA(rank=4, dora=True, targets=SOME),
    "pissa": LoRA(rank=4, init="pissa"),
    "pissa, some, rslora": LoRA(rank=4, init="pissa", rslora=True, targets=SOME),
    "olora": LoRA(rank=4, init="olora"),
    "pissa and dora": LoRA(rank=4, init="pissa", dora=True),
    "frozen a": LoRA(rank=4, freeze_a=True),
    "plus": LoRA(rank=4, plus_ratio=16.0),
    "vera": VeRA(rank=8),
    "vera, some": VeRA(rank=40, targets=SOME, seed=3),
    "adalora": AdaLoRA(rank=4, target_rank=2),
    "adalora, some": AdaLoRA(rank=4, target_rank=2, targets=SOME),
}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@every_method
def test_the_model_starts_and_switches_off_as_the_base_bitwise(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    before = model(input_ids).logits
    tuned = attach(model, method)
    assert torch.equal(model(input_ids).logits, before)
    trained(tuned)
    assert not torch.equal(model(input_ids).logits, before)
    with tuned.disabled():
        assert torch.equal(model(input_ids).logits, before)


@every_method
def test_gradients_reach_all_that_trains_and_nothing_else(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    base_names = [name for name, _ in model.named_parameters()]
    tuned = trained(attach(model, method))
    loss(model, input_ids).backward()
    trainable = tuned.trainable()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trainable.values())
    others = [name for name, _ in model.named_parameters() if name not in trainable]
    assert others == base_names
    assert all(model.get_parameter(name).grad is None for name in others)


@every_method
def test_detaching_leaves_the_plain_base(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    before, keys = model(input_ids).logits, list(model.state_dict())
    tuned = trained(attach(model, method))
    tuned.merge()
    tuned.detach()
    assert torch.equal(model(input_ids).logits, before)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())


@every_method
def test_what_is_loaded_is_what_was_saved_bitwise(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained, tmp_path: Path
) -> None:
    tuned = trained(attach(model, method))
    state, logits = {n: t.clone() for n, t in tuned.state_dict().items()}, model(input_ids).logits
    tuned.save(tmp_path / "a")
    torch.manual_seed(99)  # nothing random may be drawn anew
    again = load_adapter(tuned.detach(), tmp_path / "a")
    assert torch.equal(model(input_ids).logits, logits)
    assert again.parts[0].method == method
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())


@every_method
def test_merged_and_unmerged_logits_agree_and_unmerging_is_exact(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    weights = {name: p.clone() for name, p in model.named_parameters()}
    tuned = trained(attach(model, method))
    unmerged = model(input_ids).logits
    tuned.merge()
    # float32 sums in another order
    torch.testing.assert_close(model(input_ids).logits, unmerged, atol=1e-5, rtol=1e-5)
    tuned.unmerge()
    assert all(torch.equal(model.get_parameter(name), p) for name, p in weights.items())
    assert torch.equal(model(input_ids).logits, unmerged)


@every_method
def test_gradient_checkpointing_gives_equal_gradients(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    tuned = trained(attach(model.train(), method))
    loss(model, input_ids).backward()
    plain = {name: p.grad.clone() for name, p in tuned.trainable().items()}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss(model, input_ids).backward()
    for name, parameter in tuned.trainable().items():
        torch.testing.assert_close(parameter.grad, plain[name])


@every_method
def test_left_padding_changes_nothing(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    trained(attach(model, method))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.full((2, 3), 2), input_ids], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(input_ids).logits, atol=1e-5, rtol=1e-5)


@every_method
def test_generation_with_the_cache_is_the_full_forward(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    trained(attach(model, method))
    model.generation_config.eos_token_id = None
    generated = model.generate(input_ids, max_new_tokens=8, do_sample=False)
    tokens = input_ids
    for _ in range(8):
        best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
    assert torch.equal(generated, tokens)


@every_method
def test_a_bfloat16_base_trains_in_float32_without_autocast(
    method: Method, input_ids: Tensor, loss: Loss
) -> None:
    model = tiny_llama().bfloat16()
    tuned = attach(model, method)
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=0.02)
    before = loss(model, input_ids)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, input_ids).backward()
        optimizer.step()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in tuned.trainable().values())
    assert model(input_ids).logits.dtype == torch.bfloat16
    assert loss(model, input_ids) < before


@every_method
def test_two_adapters_of_a_kind_live_on_one_model(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    tuned = trained(attach(model, method, name="first"))
    once = model(input_ids).logits
    attach(tuned, method, name="second")
    tuned.enable(False, "second")
    assert torch.equal(model(input_ids).logits, once)


@pytest.mark.slow
@every_method
def test_a_block_compiles_as_one_graph(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    torch._dynamo.reset()
    tuned = trained(attach(model, method))
    eager = model(input_ids).logits
    with tuned.disabled():
        base = model(input_ids).logits
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(input_ids).logits, eager, atol=1e-5, rtol=1e-5)
    with tuned.disabled():
        torch.testing.assert_close(model(input_ids).logits, base, atol=1e-5, rtol=1e-5)
