"""What a loss curve is: 50 steps on fixed rows with a fixed seed, as `tunesmith train` does it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tunesmith.engine.distribution import connect
from tunesmith.engine.events import Event, StepDone
from tunesmith.jobs.assemble import assemble
from tunesmith.jobs.train import fit_run, task_of
from tunesmith.models.zoo import is_cached
from tunesmith.spec import validate

HERE = Path(__file__).parent
CURVES = HERE / "curves"
MODEL = "smollm2-135m-instruct"
STEPS = 50


@dataclass(frozen=True)
class Configuration:
    """What differs between two curves."""

    device: str
    tolerance: float
    """How far the loss of a step may be from the recorded one: other processors and versions add in
    another order, and 50 steps enlarge what comes of it."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, if so."""
        if not is_cached(MODEL):
            return f"{MODEL} is not in the cache; run tunesmith models {MODEL}"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "needs a CUDA device"
        return None


LORA = {"method": {"name": "lora", "rank": 8}}
FLOAT32, BFLOAT16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
CONFIGURATIONS = {
    "sft-lora-float32-cpu": Configuration("cpu", 0.01, LORA | {"model": FLOAT32}),
    "sft-lora-bfloat16-cpu": Configuration("cpu", 0.1, LORA | {"model": BFLOAT16}),
    "sft-lora-bfloat16-cuda": Configuration("cuda", 0.1, LORA | {"model": BFLOAT16}),
    "sft-lora-fp8-cuda": Configuration("cuda", 0.1, LORA | {"model": {"quantize": "fp8"}}),
    "sft-lora-nf4-cuda": Configuration("cuda", 0.1, LORA | {"model": {"quantize": "nf4"}}),
    "sft-full-float32-cuda": Configuration("cuda", 0.1, {"method": {"name": "full"}}),
}


def curve(configuration: Configuration, *, steps: int = STEPS) -> list[float]:
    """Return the loss of every step, as it is computed here."""
    given = configuration.settings
    settings = given | {
        "name": "curve",
        "model": {"name": MODEL} | given.get("model", {}),
        "data": {"train": [{"path": str(HERE / "curve_rows.jsonl")}], "max_length": 64},
        "train": {
            "max_steps": steps,
            "batch_size": 1,
            "learning_rate": 5e-4,
            "schedule": "constant",
            "warmup": 0,
        },
        "engine": {"device": configuration.device},
        "seed": 1,
    }
    run = validate(settings, source="curve", lines={}).resolved()
    peers = connect(run.engine)
    losses: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    with TemporaryDirectory() as folder:
        task = task_of(assemble(run, peers, lambda _: None))
        fit_run(run, task, run_dir=Path(folder), listeners=[listen], peers=peers)
    return losses


def recorded(name: str) -> list[float] | None:
    """Return the curve that was recorded under this name, or None where there is none yet."""
    path = CURVES / f"{name}.json"
    if not path.exists():
        return None
    losses: list[float] = json.loads(path.read_text("utf-8"))["losses"]
    return losses
