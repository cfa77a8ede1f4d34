"""What the kind of base costs in quality: the same LoRA training on bf16, fp8, nf4 bases.

    python bench/quantize_quality.py [--device cuda] [--workers 12] [--steps 300]

SmolLM2-135M-Instruct (zoo) learns the English dialogues of chatterbot-dialogues (zoo), LoRA of
rank 16 on all linear maps, 16 rows a step; a tenth of the rows is held out and measured every 50
steps. 300 steps of 16 are under three times through the 1,822 rows that train: past that the loss
of the rows held out turns up, and differences would be those of overfitting. Three seeds (order of
rows, LoRA's start) give each base a spread to compare the differences with; the rows held out, and
the seeds, are the same for all bases, so differences between bases are paired by seed. The bases
are bf16, fp8, nf4 (products in bfloat16) and nf4 with products in float8.

All runs start together in `--workers` processes that share the device: each is too small to fill a
GPU, and compiling twelve would take longer than they do, so `engine.speed` is safe. Writes
bench/results/quantize_quality.json: the curves, the final losses, and each base's mean difference
from bf16 of the same seed relative to bf16's loss, with its smallest and largest.
"""

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BASES: dict[str, dict[str, str]] = {
    "bf16": {"quantize": "none"},
    "fp8": {"quantize": "fp8"},
    "nf4": {"quantize": "nf4"},
    "nf4-float8": {"quantize": "nf4", "products": "float8"},
}
SEEDS = (0, 1, 2)
HERE = Path(__file__).resolve().parent


def main() -> None:
    arguments = parse()
    jobs = [(base, seed, arguments.device, arguments.steps) for base in BASES for seed in SEEDS]
    # Fetched and converted once, before several processes would.
    from tunesmith.models.loading import locate
    from tunesmith.models.settings import ModelSettings

    locate("smollm2-135m-instruct", ModelSettings())
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(trained, jobs))
    record = {"steps": arguments.steps, "differences": differences(runs), "runs": runs} | about()
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["differences"], indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quantize_quality.json")
    return parser.parse_args()


def about() -> dict[str, Any]:
    from tunesmith.jobs.environment import hardware, package_versions

    return {"hardware": hardware(), "versions": package_versions()}


def trained(job: tuple[str, int, str, int]) -> dict[str, Any]:
    """Train one base with one seed and return its curve."""
    base, seed, device, steps = job
    import tunesmith
    from tunesmith import Run

    with tempfile.TemporaryDirectory() as folder:
        run = Run.model_validate(
            {
                "name": f"{base}-{seed}",
                "seed": seed,
                "output": folder,
                "model": {"name": "smollm2-135m-instruct", "dtype": "bfloat16"} | BASES[base],
                "method": {"name": "lora", "rank": 16},
                "data": {
                    "train": [{"path": "chatterbot-dialogues/english"}],
                    "holdout": 0.1,
                    "max_length": 256,
                },
                "train": {"max_steps": steps, "batch_size": 16, "learning_rate": 2e-4},
                "evaluation": {"every_steps": 50, "samples": 0},
                "engine": {"device": device, "speed": "safe"},
            }
        )
        result = tunesmith.train(run)
        summary = json.loads(result.directory.summary.read_text(encoding="utf-8"))
        lines = result.directory.metrics.read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return {
        "base": base,
        "seed": seed,
        "before": summary["before"]["loss"],
        "after": summary["after"]["loss"],
        "seconds": summary.get("seconds"),
        "curve": [event for event in events if event["event"] == "evaluated"],
    }


def differences(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return each base's final loss against bf16's of the same seed, relative to that."""
    plain = {run["seed"]: run["after"] for run in runs if run["base"] == "bf16"}
    found = {}
    for base in BASES:
        own = [run for run in runs if run["base"] == base]
        relative = [run["after"] / plain[run["seed"]] - 1 for run in own]
        found[base] = {
            "loss": statistics.mean(run["after"] for run in own),
            "relative": statistics.mean(relative),
            "smallest": min(relative),
            "largest": max(relative),
        }
    return found


if __name__ == "__main__":
    main()
