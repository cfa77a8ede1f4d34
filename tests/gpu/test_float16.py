"""Training in float16 on CUDA, compiled and not: the losses of float32, with no step left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from plain_task import events_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(tiny_model: Path, folder: Path, **settings: Any) -> list[float]:
    """The loss of every step of LoRA on a tiny model."""
    made = tunesmith.Run(
        output=str(folder),
        method={"name": "lora", "rank": 8},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 64},
        train={"max_steps": 12, "batch_size": 16, "learning_rate": 1e-2, "warmup": 0},
        **settings,
    )
    result = tunesmith.train(made)
    assert result.summary["skipped_steps"] == 0
    return [event["loss"] for event in events_of(result.directory.path, "step_done")]


@pytest.mark.parametrize("speed", ["safe", "auto"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_losses_are_those_of_float32(
    speed: str, quantize: str, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"say {n % 7}", "completion": f"it is {n % 7}"} for n in range(64)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    exact, found = (
        losses(
            tiny_model,
            tmp_path,
            name=dtype,
            model={"name": str(tiny_model), "dtype": dtype, "quantize": quantize},
            engine={"device": "cuda", "speed": speed},
        )
        for dtype in ("float32", "float16")
    )
    assert found == pytest.approx(exact, rel=1e-2)
