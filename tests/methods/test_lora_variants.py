"""DoRA, PiSSA, OLoRA, LoRA+ and LoRA-FA: against PEFT, and against their equations."""

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
from tunesmith.engine.optimizer import build_optimizer, set_learning_rate
from tunesmith.engine.settings import TrainSettings
from tunesmith.errors import MethodError
from tunesmith.methods import LoRA
from tunesmith.methods.low_rank import DoRA, LowRank, Place, orthonormal_pair, principal_pair
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")


def theirs(reference: PeftModel, name: str) -> nn.Parameter:
    """Return PEFT's parameter for ours of this name."""
    path, _, leaf = name.partition(".lora_default.")
    kind = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}[leaf]
    return reference.get_parameter(f"base_model.model.{path}.{kind}.default.weight")


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=4, dora=True), LoRA(rank=4, alpha=3, rslora=True, dora=True)],
    ids=["dora", "dora, rslora"],
)
def test_dora_gives_pefts_logits_and_gradients(
    method: LoRA,
    model: PreTrainedModel,
    trained: Trained,
    input_ids: Tensor,
    loss: Loss,
    tmp_path: Path,
) -> None:
    base = deepcopy(model)
    tuned = trained(attach(model, method))
    tuned.export_peft(tmp_path / "a")
    reference = PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True).eval()
    torch.testing.assert_close(
        model(input_ids).logits, reference(input_ids).logits, atol=1e-5, rtol=1e-5
    )
    loss(model, input_ids).backward()
    loss(reference, input_ids).backward()
    for name, parameter in tuned.trainable().items():
        torch.testing.assert_close(parameter.grad, theirs(reference, name).grad)


@pytest.mark.parametrize("targets", ["all", ["attention.q", "attention.v"]], ids=["all", "some"])
def test_peft_loads_dora_of_a_fused_projection(
    targets: list[str], trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_gpt2()
    tuned = trained(attach(model, LoRA(rank=4, dora=True, targets=targets)))
    expected = model(input_ids).logits
    tuned.save(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tuned.detach(), tmp_path / "a").eval()
    torch.testing.assert_close(loaded(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_dora_directory_that_peft_saved_gives_pefts_logits(
    model: PreTrainedModel, input_ids: Tensor, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = peft.get_peft_model(deepcopy(model), config)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "a")
    tuned = load_adapter(model, tmp_path / "a")
    expected = reference.eval()(input_ids).logits
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert tuned.parts[0].method.dora


@pytest.mark.parametrize("columns", [None, ((0, 2), (4, 5))])
def test_dora_is_the_papers_formula_with_a_constant_norm(
    columns: tuple[tuple[int, int], ...] | None,
) -> None:
    base = nn.Linear(6, 5).double().requires_grad_(False)
    pair = DoRA(Place("x", 6, 5, 2, 3.0, columns), rslora=False, dropout=0.0, init="kaiming")
    pair.double().measure(base.weight)
    for parameter in pair.parameters():
        nn.init.normal_(parameter)
    base.register_forward_hook(pair.hook)
    x = torch.randn(4, 3, 6, dtype=torch.float64)

    A, B, m = (p.detach().clone().requires_grad_() for p in (pair.A, pair.B, pair.m))
    rows = torch.tensor([0, 1, 4] if columns else [0, 1, 2, 3, 4])
    V = base.weight[rows] + 1.5 * B @ A
    W = base.weight.index_copy(0, rows, m[:, None] * V / V.detach().norm(dim=1, keepdim=True))
    expected = x @ W.T + base.bias

    # our norm is taken in float32
    torch.testing.assert_close(base(x), expected, atol=1e-5, rtol=1e-5)
    base(x).square().sum().backward()
    expected.square().sum().backward()
    for ours, plain in ((pair.A, A), (pair.B, B), (pair.m, m)):
        torch.testing.assert_close(ours.grad, plain.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("init", "make"), [("pissa", tiny_llama), ("pissa", tiny_gpt2), ("olora", tiny_llama)]
)
def test_a_start_from_the_weight_trains_as_in_peft(
    init: str, make: Callable[[], PreTrainedModel], input_ids: Tensor, loss: Loss
) -> None:
    model = make()
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        init_lora_weights=init,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    reference = peft.get_peft_model(deepcopy(model), config)
    tuned = attach(model, LoRA(rank=4, init=init))
    trainable = tuned.trainable()
    for name, parameter in trainable.items():
        torch.testing.assert_close(parameter, theirs(reference, name), atol=1e-5, rtol=1e-4)
    optimizers = [
        torch.optim.SGD(trainable.values(), lr=0.1),
        torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1),
    ]
    start = model(input_ids).logits
    for _ in range(3):
        for optimizer, network in zip(optimizers, (model, reference), strict=True):
            optimizer.zero_grad()
            loss(network, input_ids).backward()
            optimizer.step()
    ours, peft_logits = model(input_ids).logits, reference(input_ids).logits
    assert (ours - start).abs().max() > 100 * (ours - peft_logits).abs().max()
    torch.testing.assert_close(ours, peft_logits, atol=1e-4, rtol=1e-4)


def test_a_start_from_the_weight_is_exported_over_the_plain_base(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    tuned = trained(attach(model, LoRA(rank=4, init="pissa", rslora=True)))
    expected = model(input_ids).logits
    tuned.export_peft(tmp_path / "a")
    loaded = PeftModel.from_pretrained(deepcopy(tuned.detach()), tmp_path / "a").eval()
    torch.testing.assert_close(loaded(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
    # without tunesmith.json it is a plain LoRA of twice the rank
    again = load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert again.parts[0].method.rank == 8


def test_a_principal_pair_is_the_best_approximation() -> None:
    weight = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A, B = principal_pair(weight, 3, 0.5)
    S = torch.linalg.svdvals(weight)
    residual = torch.linalg.svdvals(weight.float() - 0.5 * B @ A)
    torch.testing.assert_close(residual[:4].double(), S[3:], atol=1e-5, rtol=1e-5)


def test_an_orthonormal_pair_has_orthonormal_columns_and_leaves_what_it_does_not_span() -> None:
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    A, B = orthonormal_pair(weight, 3)
    torch.testing.assert_close(B.T @ B, torch.eye(3), atol=1e-5, rtol=0)
    # the part of W inside the span of Q_r is gone from the rest
    torch.testing.assert_close(B.T @ (weight - B @ A), torch.zeros(3, 7), atol=1e-5, rtol=0)


def test_the_default_scale_of_a_start_from_the_weight_is_one() -> None:
    for rslora in (False, True):
        method = LoRA(rank=9, init="pissa", rslora=rslora)
        place = Place("x", 20, 20, 9, method.strength)
        assert LowRank(place, rslora=rslora, dropout=0.0, init="pissa").scale == 1.0


@pytest.mark.parametrize("setting", [{"dora": True}, {"init": "pissa"}, {"init": "olora"}])
def test_what_reads_the_weight_refuses_a_quantised_one(setting: dict[str, object]) -> None:
    model = tiny_llama()
    quantised = nn.Parameter(torch.zeros(32, 48, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.down_proj.weight = quantised
    with pytest.raises(MethodError, match=r"layers\.1\.mlp\.down_proj is quantised .*method\."):
        attach(model, LoRA(rank=4, **setting))
    assert not any("lora_default" in name for name, _ in model.named_parameters())


def test_frozen_a_is_no_parameter_and_keeps_no_input_for_the_backward_pass() -> None:
    base = nn.Linear(64, 64).requires_grad_(False)
    place = Place("x", 64, 64, 2, 4.0)
    pair = LowRank(place, rslora=False, dropout=0.0, init="kaiming", freeze_a=True)
    base.register_forward_hook(pair.hook)
    assert [name for name, _ in pair.named_parameters()] == ["B"]
    saved: list[Tensor] = []
    x = torch.randn(100, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        base(x)
    assert not any(t.data_ptr() == x.data_ptr() for t in saved)


def test_b_learns_at_its_own_rate() -> None:
    """One SGD-like step of Adam moves each element by its learning rate."""
    tuned = attach(tiny_llama(), LoRA(rank=4, plus_ratio=16.0, targets=["attention.q"]))
    trainable = tuned.trainable()
    before = {name: p.detach().clone() for name, p in trainable.items()}
    settings = TrainSettings(weight_decay=0.0)
    optimizer = build_optimizer(
        trainable, settings, learning_rate=1e-3, scales=tuned.learning_rate_scales()
    )
    set_learning_rate(optimizer, 1e-2)
    for parameter in trainable.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in trainable.items():
        rate = 0.16 if name.endswith(".B") else 0.01
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, rate))


def test_rates_are_peft_loraplus_rates() -> None:
    reference = peft.get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    from peft.optimizers import create_loraplus_optimizer

    expected = create_loraplus_optimizer(
        reference, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.1
    )
    rates = {id(p): group["lr"] for group in expected.param_groups for p in group["params"]}
    tuned = attach(tiny_llama(), LoRA(rank=4, plus_ratio=16.0, targets=["attention.q"]))
    trainable = tuned.trainable()
    optimizer = build_optimizer(
        trainable, TrainSettings(), learning_rate=1e-3, scales=tuned.learning_rate_scales()
    )
    names = {id(p): name for name, p in trainable.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == rates[id(theirs(reference, names[id(parameter)]))]


def test_dora_trains_one_magnitude_an_output_more() -> None:
    plain = attach(tiny_llama(), LoRA(rank=4)).parameter_counts().trainable
    dora = attach(tiny_llama(), LoRA(rank=4, dora=True)).parameter_counts().trainable
    assert dora - plain == 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
