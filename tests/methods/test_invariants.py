"""What every method beside the base promises, whatever it computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import MethodError
from tunesmith.methods import IA3, Adapter, BitFit, Compacter, DiffPruning
from tunesmith.methods.contract import Method
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

METHODS = {
    "ia3": IA3(),
    "ia3 of keys": IA3(targets=["attention.k"], inputs=[]),
    "bitfit": BitFit(add_missing=True),
    "bitfit of queries": BitFit(targets=["attention.q", "mlp.up"], add_missing=True),
    "houlsby": Adapter(placement="houlsby", bottleneck=4),
    "pfeiffer": Adapter(bottleneck=4, layer_norm=True, activation="tanh"),
    "parallel": Adapter(placement="parallel", bottleneck=4, scale="learned"),
    "near identity": Adapter(bottleneck=4, init="near_identity"),
    "compacter": Compacter(bottleneck=8),
    "compacter++": Compacter(placement="pfeiffer", bottleneck=8, init="near_identity"),
    "diff_pruning": DiffPruning(),
    "diff_pruning of queries": DiffPruning(targets=["attention.q"], structured=False),
}
LINEAR = ["ia3", "ia3 of keys", "diff_pruning", "diff_pruning of queries"]


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def test_the_start_is_the_base_where_it_is_promised(
    method: Method, model: PreTrainedModel, input_ids: Tensor
) -> None:
    base = model(input_ids).logits
    tuned = attach(model, method)
    logits = model(input_ids).logits
    assert torch.equal(logits, base) == tuned.identity_at_start
    torch.testing.assert_close(logits, base, atol=1e-3, rtol=0)  # near identity is near


def test_gradients_reach_all_trainables_and_nothing_else(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    tuned = trained(attach(model.train(), method))
    total = loss(model, input_ids)
    if (penalty := tuned.penalty()) is not None:
        total = total + penalty
    total.backward()
    trainable = tuned.trainable()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable)
    assert all(p.grad.any() for name, p in trainable.items() if not _reaches_nothing(name))


def _reaches_nothing(name: str) -> bool:
    """A bias on the keys moves all scores of a query alike, and softmax does not see it."""
    return "k_proj" in name


def test_switched_off_is_the_base_bitwise(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    base = model(input_ids).logits
    tuned = trained(attach(model, method))
    on = model(input_ids).logits
    assert not torch.equal(on, base)
    with tuned.disabled():
        assert torch.equal(model(input_ids).logits, base)
    assert torch.equal(model(input_ids).logits, on)


def test_detached_is_the_base_and_names_stay_the_bases(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    base, names = model(input_ids).logits, list(model.state_dict())
    tuned = trained(attach(model, method))
    assert [name for name in model.state_dict() if name in names] == names
    plain = tuned.detach()
    assert torch.equal(plain(input_ids).logits, base)
    assert list(plain.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_what_is_saved_loads_with_the_same_logits(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained, tmp_path: Path
) -> None:
    tuned = trained(attach(model, method))
    expected = model(input_ids).logits
    tuned.save(tmp_path / "a")
    loaded = load_adapter(tuned.detach(), tmp_path / "a")
    assert torch.equal(model(input_ids).logits, expected)
    assert loaded.parts[0].method == method
    base = {name for name, _ in tuned.model.named_parameters() if "default" not in name}
    assert not base & set(load_file(tmp_path / "a" / "adapter_model.safetensors"))


@pytest.mark.parametrize("method", [METHODS[name] for name in LINEAR], ids=LINEAR)
def test_merged_is_unmerged_and_comes_out_bitwise(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned = trained(attach(model, method))
    beside = model(input_ids).logits
    tuned.merge()
    # float32 sums in another order
    torch.testing.assert_close(model(input_ids).logits, beside, atol=1e-5, rtol=1e-5)
    tuned.unmerge()
    assert torch.equal(model(input_ids).logits, beside)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


@pytest.mark.parametrize("method", [METHODS["houlsby"], METHODS["compacter"]])
def test_what_is_not_linear_says_so(method: Method, model: PreTrainedModel) -> None:
    tuned = attach(model, method)
    with pytest.raises(MethodError, match="activation between its two maps"):
        tuned.merge()
    with pytest.raises(MethodError, match="PEFT has no format"):
        tuned.attachments[0].export_peft()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(
    reentrant: bool,
    method: Method,
    model: PreTrainedModel,
    input_ids: Tensor,
    trained: Trained,
    loss: Loss,
) -> None:
    tuned = trained(attach(model.train(), method))
    torch.manual_seed(3)  # diff pruning draws its gates
    loss(model, input_ids).backward()
    plain = {name: p.grad.clone() for name, p in tuned.trainable().items()}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    loss(model, input_ids).backward()
    for name, parameter in tuned.trainable().items():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_left_padding_changes_nothing(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    trained(attach(model, method))
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids, attention_mask=mask, position_ids=positions).logits[0, 3:]
    torch.testing.assert_close(padded, model(input_ids[:1, 3:]).logits[0])


def test_generating_with_the_cache_is_the_full_forward(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    trained(attach(model, method))
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    cached = model.generate(
        input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    for row, start in zip(cached, (3, 0), strict=True):
        whole = row[start:][None]
        chosen = model(whole).logits[0, 6 - start : -1].argmax(-1)
        assert torch.equal(chosen, whole[0, 7 - start :])


def test_a_bfloat16_base_trains_float32_parameters(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    tuned = trained(attach(model.bfloat16().train(), method))
    before = {name: p.detach().clone() for name, p in tuned.trainable().items()}
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n not in before}
    value = loss(model, input_ids)
    value.backward()
    torch.optim.AdamW(tuned.trainable().values(), lr=0.1).step()
    assert torch.isfinite(value)
    for name, parameter in tuned.trainable().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter, before[name])
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.items())


@pytest.mark.slow
def test_compiled_blocks_are_one_graph_with_equal_outputs(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained, loss: Loss
) -> None:
    torch._dynamo.reset()
    tuned = trained(attach(model, method))
    eager = model(input_ids).logits
    loss(model, input_ids).backward()
    gradients = {name: p.grad.clone() for name, p in tuned.trainable().items()}
    model.zero_grad()
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(fullgraph=True, backend="aot_eager")
    # the compiler may fuse and so reorder float32 sums
    torch.testing.assert_close(model(input_ids).logits, eager, atol=1e-5, rtol=1e-5)
    loss(model, input_ids).backward()
    for name, parameter in tuned.trainable().items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)
    with tuned.disabled():
        assert not torch.isclose(model(input_ids).logits, eager).all()
