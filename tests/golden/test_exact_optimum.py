"""A task whose optimum is known: write a given pattern. PPO, GRPO and RLOO must come to it.

The reward is the share of right tokens, so a policy that knows the pattern has 1, and one that
draws among the 8 tokens at random has about 1/8.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_llama
from tunesmith import Full, attach
from tunesmith.data.collate_replies import ReplyCollator, reply_row
from tunesmith.methods.value_head import ValueHead
from tunesmith.objectives.advantages import generalised_advantages, whitened
from tunesmith.objectives.grpo import GRPO
from tunesmith.objectives.ppo import PPO
from tunesmith.objectives.replies import policy_of
from tunesmith.rollout.draw import row_seeds
from tunesmith.rollout.sample import Stops, sample

PATTERN = [3, 6, 4, 7]
REPLIES, SAMPLES, UPDATES = 256, 16, 88
REWARDS = [{"kind": "exact"}]
COLLATE = ReplyCollator(0, "right")
ROLLOUT = {"replies": REPLIES, "max_new_tokens": len(PATTERN)}
OBJECTIVES = {
    "ppo": PPO(rewards=REWARDS, rollout=ROLLOUT, kl=0.0, value_weight=0.5),
    "grpo": GRPO(rewards=REWARDS, rollout=ROLLOUT, samples=SAMPLES, epochs=2),
    "rloo": GRPO(
        rewards=REWARDS,
        rollout=ROLLOUT,
        samples=SAMPLES,
        epochs=2,
        baseline="leave_one_out",
        scale="none",
    ),
}


def written(model: nn.Module, round_: int) -> tuple[list[list[int]], Tensor]:
    """Replies to one prompt, and which of their tokens are right, (replies, length)."""
    seeds = row_seeds(0, range(round_ * REPLIES, (round_ + 1) * REPLIES))
    found = sample(
        model,
        [[1, 2]] * REPLIES,
        seeds,
        max_new_tokens=len(PATTERN),
        stops=Stops(),
        pad_token_id=0,
    )
    replies = [reply.tokens for reply in found]
    return replies, (torch.tensor(replies) == torch.tensor(PATTERN)).float()


def lessons(objective: PPO | GRPO, model: nn.Module, batch: dict[str, Any], right: Tensor) -> None:
    """Put into `batch` what the objective learns from."""
    scores = right.mean(1)
    with torch.no_grad():
        policy = policy_of(model, batch)
        batch["old_log_probs"] = policy.log_probs
        if isinstance(objective, GRPO):
            advantages = objective.advantages(scores.view(-1, SAMPLES)).flatten()
            batch["advantages"] = advantages.repeat_interleave(right.shape[1])
            return
        values = objective.values(model, batch, policy.hidden).view_as(right)
    mask = torch.ones_like(right, dtype=torch.bool)
    rewards = torch.zeros_like(right)
    rewards[:, -1] = scores
    learnt = generalised_advantages(rewards, values, mask, gamma=1.0, lam=objective.lam)
    batch["old_values"], batch["returns"] = values.flatten(), learnt.returns.flatten()
    batch["advantages"] = whitened(learnt.advantages, mask).flatten()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_optimum_is_reached(name: str) -> None:
    objective = OBJECTIVES[name]
    tuned = attach(tiny_llama(vocab_size=8, num_hidden_layers=1), Full())
    if isinstance(objective, PPO):
        attach(tuned, ValueHead(), name="value")
    model = tuned.model
    optimizer = torch.optim.Adam(tuned.trainable().values(), lr=1.5e-3)
    first = float(written(model, 0)[1].mean())
    for update in range(1, UPDATES + 1):
        replies, right = written(model, update)
        batch = COLLATE([reply_row([1, 2], reply) for reply in replies])
        lessons(objective, model, batch, right)
        for _ in range(objective.epochs):
            terms = objective.loss(model, batch)
            optimizer.zero_grad()
            (terms.total / terms.count).backward()
            nn.utils.clip_grad_norm_(tuned.trainable().values(), 1.0)
            optimizer.step()
    reached = float(written(model, UPDATES + 1)[1].mean())
    assert first < 0.25
    assert reached >= 0.95
