"""Rows of judged replies that a tiny model can learn in seconds."""

import json
import random
from pathlib import Path
from typing import Any

from tunesmith import (
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    LoRA,
    ModelSettings,
    Run,
    Source,
    TrainSettings,
)
from tunesmith.engine.settings import CheckpointSettings


def pair_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of unequal length; the better reply says `yes` and the worse one `no`."""
    drawn = random.Random(seed)
    rows = []
    for number in range(count):
        word = "".join(drawn.choice("abcdefgh") for _ in range(drawn.randint(2, 9)))
        rest = "!" * (number % 4)
        rows.append(
            {"prompt": f"{word} {number}?", "chosen": "yes" + rest, "rejected": "no" + rest[:1]}
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def run_of(folder: Path, base: Path, objective: Any, **changes: Any) -> Run:
    """A run over pairs."""
    rows = folder / "pairs.jsonl"
    if not rows.exists():
        write_rows(rows, pair_rows(64))
    settings: dict[str, Any] = {
        "name": "job",
        "output": str(folder / "runs"),
        "model": ModelSettings(name=str(base), dtype="float32"),
        "method": LoRA(rank=4),
        "objective": objective,
        "data": DataSettings(train=[Source(path=str(rows))], holdout=16, max_length=128),
        "train": TrainSettings(max_steps=6, batch_size=8, learning_rate=1e-2),
        "evaluation": EvaluationSettings(samples=1, batch_size=8, max_new_tokens=4),
        "checkpoint": CheckpointSettings(),
        "engine": EngineSettings(device="cpu"),
    }
    return Run(**(settings | changes))
