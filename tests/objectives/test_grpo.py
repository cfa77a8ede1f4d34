"""GRPO's loss and its relatives', against their formulas over whole logits."""

import math

import pytest
import torch
from pydantic import ValidationError

from replies import LENGTHS, plain_log_probs, reply_batch
from tiny import tiny_llama
from tunesmith import LoRA, attach
from tunesmith.objectives.grpo import GRPO

REWARDS = [{"kind": "exact"}]


def policy() -> torch.nn.Module:
    tuned = attach(tiny_llama().double(), LoRA(rank=2))
    for parameter in tuned.trainable().values():
        parameter.data = parameter.data.double()
        torch.nn.init.normal_(parameter, std=0.2)
    return tuned.model


def drawn(model: torch.nn.Module) -> tuple[dict, torch.Tensor]:
    """A batch with advantages a reply, and the policy's log-probabilities."""
    advantages = torch.randn(3, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    batch = reply_batch(advantages=advantages)
    new, _ = plain_log_probs(model, batch)
    batch["old_log_probs"] = (new + 0.3 * torch.randn_like(new)).detach()
    batch["reference_log_probs"] = (new + 0.3 * torch.randn_like(new)).detach()
    return batch, new


@pytest.mark.parametrize("mean_over", ["replies", "tokens", "constant"])
@pytest.mark.parametrize("importance", ["token", "reply"])
def test_the_loss_is_the_papers(mean_over: str, importance: str) -> None:
    model = policy()
    batch, new = drawn(model)
    settings = GRPO(
        rewards=REWARDS,
        clip=0.1,
        clip_high=0.2,
        mean_over=mean_over,
        importance=importance,
        kl=0.05,
        rollout={"replies": 8, "max_new_tokens": 20},
    )
    terms = settings.loss(model, batch)
    total, start = 0.0, 0
    for length in LENGTHS:
        tokens = range(start, start + length)
        start += length
        logs = [float(new.detach()[t] - batch["old_log_probs"][t]) for t in tokens]
        mean = sum(logs) / length
        reply = 0.0
        for t, log in zip(tokens, logs, strict=True):
            r = math.exp(mean if importance == "reply" else log)
            A = float(batch["advantages"][t])
            d = float(batch["reference_log_probs"][t] - new.detach()[t])
            reply += max(-A * r, -A * min(max(r, 0.9), 1.2)) + 0.05 * (math.exp(d) - 1 - d)
        total += reply / {"replies": length, "tokens": 1, "constant": 20}[mean_over]
    assert float(terms.total) == pytest.approx(total, rel=1e-5)
    assert terms.count == (8 if mean_over == "tokens" else 3)


@pytest.mark.parametrize("importance", ["token", "reply"])
def test_without_old_log_probs_it_is_the_policy_gradient(importance: str) -> None:
    """On policy r = 1, and the gradient is that of -A log p (Williams 1992)."""
    model = policy()
    batch, new = drawn(model)
    del batch["old_log_probs"]
    settings = GRPO(rewards=REWARDS, mean_over="tokens", importance=importance)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(settings.loss(model, batch).total, weights)
    plain = -(batch["advantages"] * new).sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings", [{}, {"scale": "none", "baseline": "leave_one_out"}, {"importance": "reply"}]
)
def test_groups_of_equal_scores_give_no_gradient(settings: dict) -> None:
    model = policy()
    objective = GRPO(rewards=REWARDS, samples=3, rollout={"replies": 3}, **settings)
    advantages = objective.advantages(torch.full((1, 3), 0.3))[0]
    batch, _ = drawn(model)
    batch["advantages"] = advantages.double().repeat_interleave(torch.tensor(LENGTHS))
    objective.loss(model, batch).total.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="multiple of samples"):
        GRPO(rewards=REWARDS, samples=3)
    with pytest.raises(ValidationError, match="scale: none"):
        GRPO(rewards=REWARDS, baseline="leave_one_out")
