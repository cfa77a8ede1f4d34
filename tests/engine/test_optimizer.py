"""AdamW: its formula, what decays, and its state by name."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from plain_task import plain_task, train, weights
from tunesmith.engine.optimizer import build_optimizer, load_state_by_name, state_by_name
from tunesmith.engine.settings import TrainSettings
from tunesmith.errors import CheckpointError, SetupError


def two_parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"matrix": nn.Parameter(torch.randn(4, 3)), "vector": nn.Parameter(torch.randn(3))}


def test_a_step_is_adamw_in_float64_and_vectors_do_not_decay() -> None:
    trainable = two_parameters()
    before = {name: p.detach().double() for name, p in trainable.items()}
    gradients = {name: torch.randn_like(p) for name, p in trainable.items()}
    settings = TrainSettings(weight_decay=0.1, betas=(0.8, 0.9))
    optimizer = build_optimizer(trainable, settings, learning_rate=0.01)
    for name, parameter in trainable.items():
        parameter.grad = gradients[name]
    optimizer.step()
    for name, decay in (("matrix", 0.1), ("vector", 0.0)):
        # First step: bias correction makes the moments g and g^2.
        g = gradients[name].double()
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * g / (g.square().sqrt() + 1e-8)
        torch.testing.assert_close(trainable[name].detach(), expected.float())


def test_what_is_named_does_not_decay_though_it_is_a_matrix() -> None:
    trainable = two_parameters()
    before = trainable["matrix"].detach().clone()
    settings = TrainSettings(weight_decay=0.1)
    optimizer = build_optimizer(trainable, settings, learning_rate=0.1, undecayed={"matrix"})
    trainable["matrix"].grad = torch.zeros_like(before)
    optimizer.step()
    assert torch.equal(trainable["matrix"], before)


def test_fused_steps_are_those_of_the_plain_loop() -> None:
    ours, plain = two_parameters(), two_parameters()
    settings = TrainSettings(weight_decay=0.0)
    optimizer = build_optimizer(ours, settings, learning_rate=0.01)
    reference = torch.optim.AdamW(
        plain.values(), lr=0.01, weight_decay=0.0, foreach=False, fused=False
    )
    for step in range(5):
        for name in ours:
            gradient = torch.randn(ours[name].shape, generator=torch.Generator().manual_seed(step))
            ours[name].grad, plain[name].grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, plain)


def test_the_state_is_named_and_goes_back_to_its_parameter() -> None:
    trainable, other = two_parameters(), two_parameters()
    settings = TrainSettings(weight_decay=0.1)
    optimizer = build_optimizer(trainable, settings, learning_rate=0.01)
    for parameter in trainable.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = state_by_name(optimizer, trainable)
    again = build_optimizer(other, settings, learning_rate=0.01)
    load_state_by_name(again, other, state)
    assert state.keys() == {
        f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in trainable
    }
    torch.testing.assert_close(state_by_name(again, other), state, rtol=0, atol=0)


def test_state_of_another_parameter_is_refused() -> None:
    trainable = two_parameters()
    optimizer = build_optimizer(trainable, TrainSettings(), learning_rate=0.01)
    with pytest.raises(CheckpointError, match="'elsewhere', which does not train"):
        load_state_by_name(optimizer, trainable, {"exp_avg/elsewhere": torch.zeros(1)})


def test_adamw_8bit_without_bitsandbytes_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    settings = TrainSettings(optimizer="adamw_8bit")
    with pytest.raises(SetupError, match=r"tunesmith\[quantize\]"):
        build_optimizer(two_parameters(), settings, learning_rate=0.01)


@pytest.mark.slow
def test_adamw_8bit_resumes_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")

    def wide(seed: int) -> dict[str, nn.Parameter]:
        torch.manual_seed(seed)
        # Below 4096 elements bitsandbytes keeps 32-bit state.
        return {"large": nn.Parameter(torch.randn(80, 80)), "small": nn.Parameter(torch.randn(5))}

    def task(seed: int) -> object:
        chosen = plain_task()
        parameters = wide(seed)
        for name, parameter in parameters.items():
            chosen.model.register_parameter(name, parameter)
        chosen.trainable = parameters
        chosen.penalty = lambda: sum(p.square().sum() for p in parameters.values())
        return chosen

    settings = {"optimizer": "adamw_8bit", "save_every": 3, "keep": 9}
    whole, resumed = task(1), task(2)
    train(whole, tmp_path / "whole", **settings)
    start = tmp_path / "whole" / "checkpoints" / "step-00000003"
    train(resumed, tmp_path / "resumed", resume_from=start, **settings)
    chosen = {"large", "small"}
    before = {name: value for name, value in weights(whole).items() if name in chosen}
    after = {name: value for name, value in weights(resumed).items() if name in chosen}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
