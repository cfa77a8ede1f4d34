"""Diff pruning: the paper's equations in float64, both phases, files as small as promised."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tiny import tiny_gpt2, tiny_llama
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.engine.settings import TrainSettings
from tunesmith.errors import AdapterError
from tunesmith.methods import DiffPruning
from tunesmith.methods.diff_pruning import Diff, Gated
from tunesmith.methods.hard_concrete import gates, probability_nonzero
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

ALPHAS = torch.tensor([-4.0, -1.0, 0.0, 0.5, 1.0, 5.0], dtype=torch.float64)


def papers_gate(alpha: float, u: float) -> float:
    """Section 2.2 with l = -1.5 and r = 1.5, for one gate."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + alpha)))
    return min(1.0, max(0.0, s * (1.5 + 1.5) - 1.5))


def test_drawn_gates_are_the_papers() -> None:
    torch.manual_seed(0)
    u = torch.rand(6, dtype=torch.float64).clamp(1e-4, 1 - 1e-4)
    torch.manual_seed(0)
    drawn = gates(ALPHAS, sample=True)
    expected = [papers_gate(a, b) for a, b in zip(ALPHAS.tolist(), u.tolist(), strict=True)]
    torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64))


def test_gates_at_rest_are_their_medians() -> None:
    expected = [papers_gate(a, 0.5) for a in ALPHAS.tolist()]
    still = gates(ALPHAS, sample=False)
    torch.testing.assert_close(still, torch.tensor(expected, dtype=torch.float64))
    torch.manual_seed(0)
    drawn = torch.stack([gates(ALPHAS, sample=True) for _ in range(4001)])
    torch.testing.assert_close(drawn.median(0).values, still, atol=0.05, rtol=0)


def test_the_probability_of_an_open_gate_is_how_often_it_is_open() -> None:
    torch.manual_seed(0)
    drawn = torch.stack([gates(ALPHAS, sample=True) > 0 for _ in range(4000)])
    # three standard errors of a share of 4,000 draws
    torch.testing.assert_close(
        drawn.double().mean(0), probability_nonzero(ALPHAS), atol=0.024, rtol=0
    )
    with_gradient = ALPHAS.clone().requires_grad_()
    assert torch.autograd.gradcheck(probability_nonzero, with_gradient)


@pytest.mark.parametrize("columns", [None, ((0, 2), (4, 5))])
@pytest.mark.parametrize("structured", [True, False])
def test_the_output_is_the_papers_formula(
    structured: bool, columns: tuple[tuple[int, int], ...] | None
) -> None:
    base = Conv1D(5, 6).double()
    diff = Diff(base, "x", columns, structured=structured).double().eval()
    for parameter in diff.parameters():
        nn.init.normal_(parameter)
    diff.register_on(base)
    x = torch.randn(4, 3, 6, dtype=torch.float64)

    def delta(gated: Gated) -> Tensor:
        z = torch.tensor([papers_gate(a, 0.5) for a in gated.alpha.flatten().tolist()]).double()
        group = papers_gate(gated.alpha_group.item(), 0.5) if structured else 1.0
        whole = torch.zeros(5, *gated.w.shape[1:], dtype=torch.float64)
        whole[[0, 1, 4] if columns else slice(None)] = group * z.view_as(gated.w) * gated.w.detach()
        return whole

    expected = x @ (base.weight + delta(diff.weight).T) + base.bias + delta(diff.bias)
    # the gates above are rounded to float32
    torch.testing.assert_close(base(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("structured", [True, False])
def test_the_penalty_is_the_expected_number_of_open_gates(structured: bool) -> None:
    method = DiffPruning(l0_penalty=0.5, structured=structured)
    tuned = attach(tiny_gpt2(), method)
    for parameter in tuned.trainable().values():
        nn.init.normal_(parameter)
    expected = 0.0
    for name, alpha in tuned.trainable().items():
        if name.endswith(".alpha"):
            chance = torch.sigmoid(alpha.detach().double()).sum()  # log(-l / r) = 0
            if structured:
                chance = chance * torch.sigmoid(
                    tuned.trainable()[f"{name}_group"].detach().double()
                )
            expected += float(chance)
    assert tuned.penalty().item() == pytest.approx(0.5 * expected, rel=1e-5)


def train(tuned: TunedModel, input_ids: Tensor, *, steps: range, total: int = 8) -> None:
    scales = {n: tuned.attachments[0].learning_rate_scale(n) for n in tuned.trainable()}
    for step in steps:
        torch.manual_seed(step)
        loss = tuned.model(input_ids, labels=input_ids).loss + (tuned.penalty() or 0.0)
        loss.backward()
        with torch.no_grad():
            for name, parameter in tuned.trainable().items():
                parameter.sub_(1e-3 * scales[name] * parameter.grad.sign())
        tuned.on_step(step, total)
        tuned.model.zero_grad()


def changes(tuned: TunedModel) -> Tensor:
    parts = tuned.attachments[0]._parts.values()
    return torch.cat([part.delta().detach().flatten() for part in parts])


def test_the_change_is_cut_to_the_asked_sparsity_and_its_places_stay(
    model: PreTrainedModel, input_ids: Tensor
) -> None:
    tuned = attach(model.train(), DiffPruning(sparsity=0.01, gate_learning_rate_scale=10.0))
    train(tuned, input_ids, steps=range(1, 4))
    dense = changes(tuned)
    train(tuned, input_ids, steps=range(4, 5))
    cut = changes(tuned)
    kept = round(0.01 * cut.numel())
    assert int((cut != 0).sum()) == kept < int((dense != 0).sum())
    train(tuned, input_ids, steps=range(5, 9))
    last = changes(tuned)
    assert torch.equal(last != 0, cut != 0)
    assert not torch.equal(last, cut)
    assert tuned.penalty() is None


def test_the_largest_elements_of_all_weights_together_are_kept(trained: Trained) -> None:
    tuned = trained(attach(tiny_gpt2(), DiffPruning(sparsity=0.02)))
    dense = changes(tuned)
    tuned.attachments[0].project()
    cut = changes(tuned)
    threshold = dense.abs().sort(descending=True).values[round(0.02 * dense.numel()) - 1]
    assert torch.equal(cut, torch.where(dense.abs() >= threshold, dense, 0.0))


def test_drawing_no_longer_matters_once_the_places_are_fixed(
    trained: Trained, input_ids: Tensor
) -> None:
    model = tiny_llama()
    tuned = trained(attach(model, DiffPruning(sparsity=0.1)))
    tuned.attachments[0].project()
    model.train()
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    assert torch.equal(model(input_ids).logits, model.eval()(input_ids).logits)


def test_gates_are_drawn_in_training_only(trained: Trained, input_ids: Tensor) -> None:
    model = tiny_llama()
    trained(attach(model, DiffPruning()))
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_resumed_training_goes_on_as_if_uninterrupted(stop: int, input_ids: Tensor) -> None:
    method = DiffPruning(sparsity=0.01, gate_learning_rate_scale=10.0)
    base = tiny_gpt2().state_dict()
    whole, first, second = (tiny_gpt2() for _ in range(3))
    for model in (whole, first, second):
        model.load_state_dict(base)
        model.train()
    uninterrupted, before, after = (attach(model, method) for model in (whole, first, second))
    train(uninterrupted, input_ids, steps=range(1, 9))
    train(before, input_ids, steps=range(1, stop + 1))
    after.load_state_dict(before.state_dict())
    after.load_extra_state(before.extra_state())
    train(after, input_ids, steps=range(stop + 1, 9))
    expected = uninterrupted.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in after.state_dict().items())


def test_the_file_is_as_small_as_the_sparsity_promises(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    tuned = trained(attach(model, DiffPruning(sparsity=0.05)))
    tuned.attachments[0].project()
    expected = model(input_ids).logits
    tuned.save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    size = changes(tuned).numel()
    values = sum(t.numel() for n, t in tensors.items() if n.endswith(".values"))
    assert values == round(0.05 * size)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 8 * values
    loaded = load_adapter(tuned.detach(), tmp_path / "a")
    assert torch.equal(model(input_ids).logits, expected)
    loaded.on_step(8, 8)
    assert torch.equal(model(input_ids).logits, expected)


def test_merging_adds_the_change_exactly(trained: Trained) -> None:
    model = tiny_gpt2()
    linear = model.transformer.h[0].attn.c_attn
    weight, bias = linear.weight.clone(), linear.bias.clone()
    tuned = trained(attach(model.train(), DiffPruning(targets=["attention.v"])))
    delta = linear.diff_default.weight.delta().detach()
    tuned.merge()
    assert torch.equal(linear.weight[:, 64:], weight[:, 64:] + delta.T)
    assert torch.equal(linear.weight[:, :64], weight[:, :64])
    assert torch.equal(linear.bias[64:], bias[64:] + linear.diff_default.bias.delta())


def test_gates_learn_faster_than_weights() -> None:
    tuned = attach(tiny_gpt2(), DiffPruning())
    scales = {
        n.rpartition(".")[2]: tuned.attachments[0].learning_rate_scale(n) for n in tuned.trainable()
    }
    assert scales == {"w": 1.0, "alpha": 2000.0, "alpha_group": 2000.0}


def test_weight_decay_leaves_fixed_places_open_and_shut() -> None:
    tuned = attach(tiny_llama(), DiffPruning(sparsity=0.05))
    tuned.attachments[0].project()
    optimizer = build_optimizer(
        tuned.trainable(),
        TrainSettings(weight_decay=0.9),
        learning_rate=5e-4,
        scales=tuned.learning_rate_scales(),
        undecayed=tuned.undecayed(),
    )
    for _ in range(8):
        for parameter in tuned.trainable().values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    changes = [module for module in tuned.model.modules() if isinstance(module, Gated)]
    assert changes
    assert all(change.is_fixed() for change in changes)


def test_a_weight_has_as_many_gates_as_elements() -> None:
    tuned = attach(tiny_llama(), DiffPruning())
    elements = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert tuned.parameter_counts().trainable == 2 * elements + 2 * 7


@pytest.mark.parametrize(("leaf", "message"), [("indices", "outside"), ("values", "is missing")])
def test_a_damaged_file_is_refused(
    leaf: str, message: str, trained: Trained, tmp_path: Path
) -> None:
    model = tiny_llama()
    trained(attach(model, DiffPruning(targets=["attention.k"]))).save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.self_attn.k_proj.diff_default.weight.{leaf}"
    if leaf == "values":
        del tensors[name]
    else:
        tensors[name] = tensors[name] + 1
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny_llama(), tmp_path / "a")


@pytest.mark.parametrize(
    "wrong", [{"sparsity": 0}, {"sparsity": 1.5}, {"fixed_phase": 1}, {"l0_penalty": -1}]
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DiffPruning.model_validate(wrong)
