"""Whole runs that learn from their own replies, by groups."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from reply_runs import StopError, adapter, events, kill_after, run_of
from tunesmith.errors import DataError, RewardError, SpecError, TunesmithError


def test_a_run_leaves_everything_it_promises(tmp_path: Path, tiny_model: Path) -> None:
    result = tunesmith.train(run_of(tmp_path, tiny_model))
    path = result.directory.path
    found = events(path, "gathered")
    assert [event["step"] for event in found] == [1, 4]
    assert found[0]["replies"] == 12
    assert found[0]["measured"]["log_prob_gap"] < 1e-4
    assert found[0]["measured"]["kl"] == 0.0
    assert set(found[0]["samples"][0]) == {"prompt", "reply", "reward"}
    steps = events(path, "step_done")
    assert steps[0]["metrics"]["ratio"] == 1.0
    assert steps[0]["metrics"]["policy_kl"] == 0.0
    assert steps[1]["metrics"]["ratio"] != 1.0
    summary = json.loads(result.directory.summary.read_text())
    assert set(summary["after"]) == {"reward", "kl", "length", "ended"}
    assert summary["before"]["kl"] == 0.0
    names = {proof["name"] for proof in summary["proofs"]}
    assert {"sampling agrees with training", "policy starts at the reference"} <= names
    assert all(proof["passed"] for proof in summary["proofs"])
    assert (path / "report.html").exists()
    assert json.loads((path / "samples.json").read_text())[0]["after"] is not None
    assert result.tuned.adapters == ["default"]


def test_a_reward_of_weight_zero_is_watched_and_teaches_nothing(
    tmp_path: Path, tiny_model: Path
) -> None:
    watched = {"kind": "length", "free": 0, "limit": 4, "unit": "characters", "weight": 0}
    taught = {}
    for name, further in (("alone", []), ("watched", [watched])):
        (tmp_path / name).mkdir()
        run = run_of(tmp_path / name, tiny_model)
        own = run.model_dump()["objective"]["rewards"]
        run = run_of(tmp_path / name, tiny_model, objective={"rewards": [*own, *further]})
        taught[name] = tunesmith.train(run).directory
    one, other = (adapter(directory.path) for directory in taught.values())
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    told = events(taught["watched"].path, "gathered")[0]
    assert told["rewards"]["odd"] == pytest.approx(told["reward"])
    assert told["rewards"]["length"] < 0
    outcomes = json.loads(taught["watched"].outcomes.read_text())
    assert len(outcomes["reward_length"]) == len(outcomes["reward"])


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_resumes_bit_for_bit_within_a_roll_out(
    tmp_path: Path, tiny_model: Path, step: int
) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_steps": 1}, "objective": {"epochs": 2}}
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = tunesmith.train(run_of(tmp_path / "whole", tiny_model, **changes))
    run = run_of(tmp_path / "cut", tiny_model, **changes)
    with pytest.raises(StopError):
        tunesmith.train(run, listeners=[kill_after(step)])
    cut = tunesmith.train(run, resume=True)
    one, other = whole.directory.path, cut.directory.path
    for name, tensor in adapter(one).items():
        assert torch.equal(tensor, adapter(other)[name])
    assert [e["reward"] for e in events(one, "gathered")] == [
        e["reward"] for e in events(other, "gathered")
    ]
    assert [e["loss"] for e in events(one, "step_done")] == [
        e["loss"] for e in events(other, "step_done")
    ]


def test_a_run_is_evaluated_again_on_its_own_and_on_other_prompts(
    tmp_path: Path, tiny_model: Path
) -> None:
    result = tunesmith.train(run_of(tmp_path, tiny_model))
    path = result.directory.path
    summary = json.loads(result.directory.summary.read_text())
    found = tunesmith.evaluate(path)
    assert found["tuned"] == summary["after"]
    assert found["base"]["kl"] == 0.0
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "Say b", "bonus": 100.0}))
    assert tunesmith.evaluate(path, data=str(other), base=False)["tuned"]["reward"] > 99


BAD = {
    "hangs": (
        "import time\ndef f(prompts, replies, **columns):\n    time.sleep(60)\n",
        "longer than 2 s",
    ),
    "raises": ("def f(prompts, replies, **columns):\n    raise KeyError('gone')\n", "gone"),
    "nan": (
        "def f(prompts, replies, **columns):\n    return [float('nan')] * len(replies)\n",
        "finite",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("on_error", ["stop", 0.0])
def test_a_reward_that_fails_stops_the_run_or_counts_as_told(
    tmp_path: Path, tiny_model: Path, kind: str, on_error: str | float
) -> None:
    code, told = BAD[kind]
    (tmp_path / "bad.py").write_text(code)
    reward = {
        "kind": "file",
        "path": str(tmp_path / "bad.py"),
        "function": "f",
        "on_error": on_error,
        "timeout": 2.0,
    }
    run = run_of(tmp_path, tiny_model, objective={"rewards": [reward]}, train={"max_steps": 1})
    if on_error == "stop":
        with pytest.raises(RewardError, match=f"row 0.*{told}"):
            tunesmith.train(run)
    else:
        result = tunesmith.train(run)
        assert events(result.directory.path, "gathered")[0]["reward"] == 0.0


def test_a_reward_that_cannot_be_used_leaves_an_earlier_run_alone(
    tmp_path: Path, tiny_model: Path
) -> None:
    run = run_of(tmp_path, tiny_model)
    run.directory.mkdir(parents=True)
    earlier = [run.directory / "run.yaml", run.directory / "summary.json"]
    for file in earlier:
        file.write_text("{}")
    (tmp_path / "reward.py").write_text("def odd(completions):\n    return [0.0]")
    with pytest.raises(SpecError, match="must have the signature"):
        tunesmith.train(run, overwrite=True)
    assert sorted(run.directory.iterdir()) == earlier


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(SpecError, match="whole number of steps"):
        tunesmith.train(run_of(tmp_path, tiny_model, train={"batch_size": 5}))
    with pytest.raises(DataError, match="max_length"):
        tunesmith.train(run_of(tmp_path, tiny_model, data={"max_length": 8}), overwrite=True)
    with pytest.raises(TunesmithError, match="streaming"):
        tunesmith.train(run_of(tmp_path, tiny_model, data={"streaming": True}), overwrite=True)
    rollout = {"replies": 12, "max_new_tokens": 6, "prompt_tokens": 4}
    cut = run_of(tmp_path, tiny_model, objective={"rollout": rollout})
    with pytest.raises(SpecError, match=r"begins with '<\|im_start\|>user.*chat_template: text"):
        tunesmith.train(cut, overwrite=True)
