"""Runs of a tiny model that learns from its own replies."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tunesmith import Run
from tunesmith.engine.events import CheckpointSaved, Event

REWARD = """
def odd(prompts, replies, bonus, **columns):
    return [sum(ord(c) % 2 for c in r) / 6 + b for r, b in zip(replies, bonus)]
"""


def run_of(folder: Path, model: Path, **changes: Any) -> Run:
    """Six steps over two roll-outs of three steps."""
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"Say {'a' * (n % 5)}", "bonus": n / 100} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings: dict[str, Any] = {
        "name": "job",
        "output": str(folder / "runs"),
        "model": {"name": str(model), "dtype": "float32"},
        "method": {"name": "lora", "rank": 4},
        "objective": {
            "name": "grpo",
            "samples": 4,
            "rewards": [{"kind": "file", "path": str(folder / "reward.py"), "function": "odd"}],
            "rollout": {"replies": 12, "max_new_tokens": 6},
            "epochs": 1,
            "kl": 0.05,
        },
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "holdout": 3, "max_length": 64},
        "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup": 0},
        "evaluation": {"samples": 2, "every_steps": 3},
        "engine": {"device": "cpu"},
    }
    for key, value in changes.items():
        settings[key] = settings.get(key, {}) | value
    return Run(**settings)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


class StopError(Exception):
    """Stands for a kill."""


def kill_after(step: int) -> Any:
    def listen(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == step:
            raise StopError

    return listen


def train_in_two_processes(run: Run, folder: Path, *options: str) -> str:
    """Train `run` by torchrun and return what was said; `folder` takes its run file."""
    file = folder / "run.yaml"
    file.write_text(run.model_dump_json())  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tunesmith", "train", str(file), *options]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said
