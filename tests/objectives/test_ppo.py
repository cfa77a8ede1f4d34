"""PPO's loss, against the paper's formulas over whole logits."""

import math

import pytest
import torch
from pydantic import ValidationError

from replies import plain_log_probs, reply_batch
from tiny import tiny_llama
from tunesmith import LoRA, attach
from tunesmith.methods.value_head import ValueHead
from tunesmith.objectives.ppo import PPO
from tunesmith.objectives.replies import policy_of

REWARDS = [{"kind": "exact"}]


def policy() -> torch.nn.Module:
    """A float64 model whose adapter and value head are not at their start."""
    tuned = attach(tiny_llama().double(), LoRA(rank=2))
    attach(tuned, ValueHead(), name="value")
    for parameter in tuned.trainable().values():
        parameter.data = parameter.data.double()
        torch.nn.init.normal_(parameter, std=0.2)
    return tuned.model


@pytest.mark.parametrize("value_clip", [None, 0.1])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_loss_is_the_papers(value_clip: float | None, kl_in: str) -> None:
    model = policy()
    count = 8
    batch = reply_batch(
        advantages=torch.randn(count, dtype=torch.float64),
        returns=torch.randn(count, dtype=torch.float64),
        old_values=torch.randn(count, dtype=torch.float64),
    )
    new, entropy = plain_log_probs(model, batch)
    batch["old_log_probs"] = (new + 0.3 * torch.randn_like(new)).detach()
    batch["reference_log_probs"] = (new + 0.3 * torch.randn_like(new)).detach()
    settings = PPO(
        rewards=REWARDS,
        clip=0.15,
        value_clip=value_clip,
        value_weight=0.3,
        entropy_weight=0.02,
        kl=0.1,
        kl_in=kl_in,
        kl_estimator="k3",
    )
    terms = settings.loss(model, batch)

    A, R, V_old = batch["advantages"], batch["returns"], batch["old_values"]
    chosen = batch["labels"][:, 1:] != -100
    hidden = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state[:, :-1][chosen]
    V = hidden @ model.value_head.weight + model.value_head.bias
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(count):
        r = math.exp(new[t] - batch["old_log_probs"][t])
        expected += max(-A[t] * r, -A[t] * min(max(r, 0.85), 1.15))
        errors = [(V[t] - R[t]) ** 2]
        if value_clip is not None:
            near = V_old[t] + min(max(V[t] - V_old[t], -value_clip), value_clip)
            errors.append((near - R[t]) ** 2)
        expected += 0.3 * max(errors) / 2 - 0.02 * entropy[t]
        if kl_in == "loss":
            d = batch["reference_log_probs"][t] - new[t]
            expected += 0.1 * (math.exp(d) - 1 - d)
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=1e-5)
    assert terms.count == count


def test_the_gradient_is_that_of_the_plain_formula() -> None:
    model = policy()
    batch = reply_batch(
        advantages=torch.randn(8, dtype=torch.float64),
        returns=torch.zeros(8, dtype=torch.float64),
        old_values=torch.zeros(8, dtype=torch.float64),
    )
    new, _ = plain_log_probs(model, batch)
    batch["old_log_probs"] = (new + 0.3 * torch.randn_like(new)).detach()
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    settings = PPO(rewards=REWARDS, value_weight=0.0, kl=0.0)
    found = torch.autograd.grad(settings.loss(model, batch).total, weights)
    r, A = (new - batch["old_log_probs"]).exp(), batch["advantages"]
    plain = torch.maximum(-A * r, -A * r.clamp(0.8, 1.2)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, weights), rtol=1e-5, atol=1e-7)


def test_the_ratio_is_exactly_1_where_the_policy_is_the_old_one() -> None:
    model = policy().float()
    batch = reply_batch(
        advantages=torch.randn(8), returns=torch.zeros(8), old_values=torch.zeros(8)
    )
    settings = PPO(rewards=REWARDS, kl=0.0)
    with torch.no_grad():
        batch["old_log_probs"] = policy_of(model, batch).log_probs
    metrics = settings.loss(model, batch).metrics
    assert float(metrics["ratio"]) == 8.0
    assert float(metrics["policy_kl"]) == 0.0
    assert float(metrics["clipped"]) == 0.0


def test_a_detached_value_function_leaves_the_policy_alone() -> None:
    model = policy().float()
    batch = reply_batch(
        advantages=torch.zeros(8),
        returns=torch.ones(8),
        old_values=torch.zeros(8),
        old_log_probs=torch.full((8,), -5.0),
    )
    for gradient in (True, False):
        model.zero_grad()
        PPO(rewards=REWARDS, kl=0.0, value_gradient=gradient).loss(model, batch).total.backward()
        lora = [p.grad for n, p in model.named_parameters() if p.requires_grad and "lora" in n]
        reached = any(g is not None and bool(g.abs().sum() > 0) for g in lora)
        assert reached == gradient
        assert bool(model.value_head.weight.grad.abs().sum() > 0)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="k1"):
        PPO(rewards=REWARDS, kl_in="loss", kl_estimator="k1")
    with pytest.raises(ValidationError, match="kl_target"):
        PPO(rewards=REWARDS, kl=0.0, kl_target=6.0)
