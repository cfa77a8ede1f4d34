"""Every objective of alignment on CUDA, as whole runs of a tiny model, roll-outs included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from reply_runs import events, run_of
from tunesmith.jobs.align import align
from tunesmith.jobs.align_spec import Alignment
from tunesmith.jobs.train import Result

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = {"device": "cuda", "speed": "safe"}
FIRST_LOSS = {"sigmoid": 0.6931, "kto": None, "ipo": None, "orpo": None, "simpo": None}


def pairs(folder: Path) -> Path:
    """Pairs whose better reply says yes, in rows that SFT can read too."""
    rows = [
        {
            "instruction": f"Say {n}",
            "input": "",
            "output": "yes" * (1 + n % 3),
            "chosen": "yes please" * (1 + n % 2),
            "rejected": "no" * (1 + n % 4),
        }
        for n in range(64)
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def judged_run(folder: Path, model: Path, objective: dict[str, Any]) -> tunesmith.Run:
    return tunesmith.Run(
        name="job",
        output=str(folder / "runs"),
        model={"name": str(model)},
        method={"name": "lora", "rank": 8},
        objective=objective,
        data={"train": [{"path": str(pairs(folder))}], "holdout": 16, "max_length": 96},
        train={"max_steps": 30, "batch_size": 16, "learning_rate": 2e-2, "warmup": 0},
        evaluation={"samples": 2, "max_new_tokens": 6},
        engine=CUDA,
    )


def summary_of(result: Result) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(result.directory.summary.read_text())
    assert all(proof["passed"] for proof in summary["proofs"])
    return summary


@pytest.mark.parametrize("loss", FIRST_LOSS)
def test_preferences_are_learned(tmp_path: Path, tiny_model: Path, loss: str) -> None:
    run = judged_run(tmp_path, tiny_model, {"name": "dpo", "loss": loss})
    result = tunesmith.train(run)
    summary = summary_of(result)
    if (expected := FIRST_LOSS[loss]) is not None:
        first = events(result.directory.path, "step_done")[0]["loss"]
        assert first == pytest.approx(expected, abs=1e-3)
    assert summary["after"]["reward_accuracy"] > 0.9


def test_a_reward_model_is_learned_and_read_back(tmp_path: Path, tiny_model: Path) -> None:
    result = tunesmith.train(judged_run(tmp_path, tiny_model, {"name": "reward"}))
    assert summary_of(result)["after"]["accuracy"] > 0.9


@pytest.mark.parametrize("name", ["grpo", "ppo"])
@pytest.mark.parametrize("decoding", ["growing", "auto"])
def test_replies_are_learned_from(
    tmp_path: Path, tiny_model: Path, name: str, decoding: str
) -> None:
    changes: dict[str, Any] = {"samples": 4} if name == "grpo" else {"epochs": 2}
    plain = run_of(tmp_path, tiny_model).model_dump()
    rewards, rollout = plain["objective"]["rewards"], {"replies": 32, "max_new_tokens": 6}
    plain["objective"] = {
        "name": name,
        "rewards": rewards,
        "rollout": rollout | {"decoding": decoding},
        "kl": 0.01,
        **changes,
    }
    plain["model"]["dtype"] = "auto"
    plain["train"] |= {"batch_size": 16, "max_steps": 24}
    plain["engine"] |= CUDA
    result = tunesmith.train(tunesmith.Run(**plain))
    summary_of(result)
    steps = events(result.directory.path, "step_done")
    assert steps[0]["metrics"]["ratio"] == 1.0
    gathered = events(result.directory.path, "gathered")
    assert gathered[-1]["reward"] > gathered[0]["reward"]


def test_a_chain_of_all_stages_is_judged(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"path": str(pairs(tmp_path))}]
    alignment = Alignment.model_validate(
        {
            "name": "chain",
            "output": str(tmp_path / "runs"),
            "common": {
                "model": {"name": str(tiny_model)},
                "data": {"train": rows, "holdout": 8, "max_length": 96},
                "train": {"max_steps": 4, "batch_size": 8},
                "evaluation": {"samples": 0},
                "engine": CUDA,
            },
            "stages": [
                {"name": "sft"},
                {"name": "reward", "from": "sft", "run": {"objective": {"name": "reward"}}},
                {
                    "name": "ppo",
                    "from": "sft",
                    "run": {
                        "objective": {
                            "name": "ppo",
                            "rewards": [{"kind": "run", "path": "${reward.directory}"}],
                            "rollout": {"replies": 16, "max_new_tokens": 6},
                        },
                        "checkpoint": {"every_steps": 2},
                    },
                },
            ],
            "judge": [{"kind": "length", "free": 0, "limit": 50, "unit": "characters"}],
            "judged": {"prompts": rows, "limit": 5, "max_new_tokens": 6, "points": 1},
        }
    )
    found = align(alignment, "chain", lambda _: None)
    assert [v["name"] for v in found["verdicts"]] == ["base", "sft", "ppo", "ppo-step-2"]
