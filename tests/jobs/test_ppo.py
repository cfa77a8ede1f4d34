"""Whole runs of proximal policy optimisation, with all roles on one backbone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from reply_runs import StopError, adapter, events, kill_after, run_of
from tiny import tiny_llama
from tunesmith import LoRA, attach
from tunesmith.errors import RewardError, SpecError
from tunesmith.jobs.roles import with_roles
from tunesmith.methods.roles import acting

PLAIN = {"checkpointing": "none"}
"""What a value function with an adapter of its own needs."""


def ppo(folder: Path, model: Path, **changes: Any) -> tunesmith.Run:
    """Six steps over two roll-outs of three steps, or one that is taken twice."""
    run = run_of(folder, model)
    settings = {
        "name": "ppo",
        "rewards": run.objective.rewards,
        "rollout": {"replies": 12, "max_new_tokens": 6},
        "epochs": 2,
        "missing_end_penalty": 0.5,
        "reward_scale": "running",
        "reward_clip": 5.0,
        "kl_target": 1.0,
        "entropy_weight": 0.01,
    } | changes.pop("objective", {})
    whole = run.model_dump() | {"objective": settings}
    for key, value in changes.items():
        whole[key] = whole[key] | value
    return tunesmith.Run(**whole)


@pytest.mark.parametrize("value", ["shared", "adapter"])
def test_a_run_leaves_the_policy_alone(tmp_path: Path, tiny_model: Path, value: str) -> None:
    result = tunesmith.train(ppo(tmp_path, tiny_model, objective={"value": value}, engine=PLAIN))
    path = result.directory.path
    steps = events(path, "step_done")
    assert steps[0]["metrics"]["ratio"] == 1.0
    assert steps[0]["metrics"]["policy_kl"] == 0.0
    assert steps[3]["metrics"]["policy_kl"] > 0
    assert len(events(path, "gathered")) == 1
    assert "value_explained" in events(path, "gathered")[0]["measured"]
    assert result.tuned.adapters == ["default"]
    assert all("value" not in name for name in adapter(path))
    summary = json.loads(result.directory.summary.read_text())
    assert all(proof["passed"] for proof in summary["proofs"])


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_resumes_bit_for_bit_within_a_roll_out(
    tmp_path: Path, tiny_model: Path, step: int
) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_steps": 1}, "train": {"max_steps": 8}}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = tunesmith.train(ppo(tmp_path / "whole", tiny_model, **dict(changes)))
    run = ppo(tmp_path / "cut", tiny_model, **dict(changes))
    with pytest.raises(StopError):
        tunesmith.train(run, listeners=[kill_after(step)])
    cut = tunesmith.train(run, resume=True)
    one, other = whole.directory.path, cut.directory.path
    for name, tensor in adapter(one).items():
        assert torch.equal(tensor, adapter(other)[name])
    for kind, key in (("gathered", "reward"), ("gathered", "measured"), ("step_done", "loss")):
        assert [e[key] for e in events(one, kind)] == [e[key] for e in events(other, kind)]


@pytest.mark.parametrize("scale", ["batch", "running"])
def test_equal_scores_have_no_scale_and_stay_as_they_are(
    tmp_path: Path, tiny_model: Path, scale: str
) -> None:
    """All replies wrong, or all right, is ordinary: divided by next to nothing they were 10,000.

    The score -1 comes once a reply and values start at 0, so no return is beyond -1 (lambda 1) and
    the value loss, half its square, not beyond 1/2.
    """
    objective = {
        "rewards": [{"kind": "length", "free": 0, "limit": 1}],
        "rollout": {"replies": 4, "max_new_tokens": 6},
        "reward_scale": scale,
        "missing_end_penalty": 0.0,
        "reward_clip": None,
        "kl_target": None,
        "kl": 0.0,
    }
    run = ppo(tmp_path, tiny_model, objective=objective, train={"max_steps": 1})
    result = tunesmith.train(run)
    (gathered,) = events(result.directory.path, "gathered")
    assert gathered["reward_std"] == 0.0
    (step,) = events(result.directory.path, "step_done")
    assert step["metrics"]["value_loss"] <= 0.5


BROKEN = """
from pathlib import Path

def odd(prompts, replies, bonus, **columns):
    events = Path(METRICS)
    if events.exists() and '"gathered"' in events.read_text():
        raise KeyError("gone")
    return [sum(ord(c) % 2 for c in r) / 6 + b for r, b in zip(replies, bonus)]
"""
"""Cannot score the second roll-out."""


def test_a_run_that_fell_in_the_middle_of_a_roll_out_resumes_bit_for_bit(
    tmp_path: Path, tiny_model: Path
) -> None:
    changes: dict[str, Any] = {
        "checkpoint": {"every_steps": 1},
        "train": {"max_steps": 8},
        "evaluation": {"every_steps": 100},
    }
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = tunesmith.train(ppo(tmp_path / "whole", tiny_model, **dict(changes)))
    run = ppo(tmp_path / "cut", tiny_model, **dict(changes))
    reward = tmp_path / "cut" / "reward.py"
    works, metrics = reward.read_text(), tmp_path / "cut" / "runs" / "job" / "metrics.jsonl"
    reward.write_text(BROKEN.replace("METRICS", repr(str(metrics))))
    with pytest.raises(RewardError, match="gone"):
        tunesmith.train(run)
    assert len(events(metrics.parent, "gathered")) == 1
    reward.write_text(works)
    cut = tunesmith.train(run, resume=True)
    one, other = whole.directory.path, cut.directory.path
    for name, tensor in adapter(one).items():
        assert torch.equal(tensor, adapter(other)[name])
    for kind, key in (("gathered", "reward"), ("gathered", "samples"), ("step_done", "loss")):
        assert [e[key] for e in events(one, kind)] == [e[key] for e in events(other, kind)]


def test_replies_are_left_when_the_policy_has_gone_too_far(
    tmp_path: Path, tiny_model: Path
) -> None:
    run = ppo(tmp_path, tiny_model, objective={"kl_stop": 1e-9})
    result = tunesmith.train(run)
    assert [e["step"] for e in events(result.directory.path, "gathered")] == [1, 2, 3, 4, 5, 6]


def test_four_roles_cost_less_than_a_fifth_of_a_model_more(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Policy, reference, value function and reward model over one backbone, in bytes."""
    model = tiny_llama(hidden_size=256, intermediate_size=512)
    base = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    tuned = attach(model, LoRA(rank=4))
    with_roles(tuned, ppo(tmp_path, tiny_model, objective={"value": "adapter"}, engine=PLAIN))
    attach(tuned, LoRA(rank=4), name="reward_0")
    adapters = sum(p.numel() * 4 for n in ("default",) for p in _of(tuned, n))
    held = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    assert set(base) <= set(held)
    assert sum(held.values()) < 1.2 * sum(base.values()) + adapters


def test_the_reference_is_the_base_bitwise_whatever_the_roles_have_learned(
    tmp_path: Path, tiny_model: Path
) -> None:
    model, ids = tiny_llama(), torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        base = model(ids).logits
    tuned = attach(model, LoRA(rank=4))
    with_roles(tuned, ppo(tmp_path, tiny_model, objective={"value": "adapter"}, engine=PLAIN))
    attach(tuned, LoRA(rank=4), name="reward_0")
    tuned.enable(False, "reward_0")
    roles = ("default", "value", "reward_0")
    with torch.no_grad():
        for parameter in (p for role in roles for p in _of(tuned, role)):
            parameter.normal_()
        found = {}
        for role in roles:
            with acting(tuned, role):
                found[role] = tuned.model(ids).logits
        with tuned.disabled():
            reference = tuned.model(ids).logits
        policy = tuned.model(ids).logits
    assert torch.equal(reference, base)
    assert torch.equal(policy, found["default"])
    differ = [base, *found.values()]
    assert not any(torch.equal(a, b) for n, a in enumerate(differ) for b in differ[:n])


def _of(tuned: tunesmith.TunedModel, name: str) -> list[torch.nn.Parameter]:
    parts = [part for part in tuned.parts if part.name == name]
    return [p for part in parts for p in part.attachment.trainable().values()]


def test_a_value_adapter_is_refused_with_checkpointing(tmp_path: Path, tiny_model: Path) -> None:
    run = ppo(
        tmp_path, tiny_model, objective={"value": "adapter"}, engine={"checkpointing": "full"}
    )
    with pytest.raises(SpecError, match="checkpointing"):
        tunesmith.train(run)
