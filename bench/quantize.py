"""What a base in 16, 8 and 4 bits takes and gives while LoRA trains on it.

    python bench/quantize.py [--model smollm2-135m-instruct] [--steps 8] [--device cpu]

Each kind of base runs in a process of its own: it loads, measures the loss of the untuned model on
text that it does not train on (this repository's documentation), takes LoRA steps of rank 16 on 4
rows of 256 tokens, and measures the loss on the same text again. `resident_bytes` is what the
process holds after that first loss more than before loading (not before it: an unquantised model on
a CPU is a window on its file until it is used), `peak_bytes` the most it held at any time (on CUDA:
what was allocated on the device). Seconds a step are the median after the first two. Nothing
is compiled here (bench/quantize_products.py times compiled products), and on a CPU float8 products
are worked out plainly, which says what they cost in loss and nothing about speed. Writes
bench/results/quantize.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS = {
    "none": {"quantize": "none"},
    "fp8": {"quantize": "fp8"},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "nf4-float8": {"quantize": "nf4", "products": "float8"},
}
BATCH, LENGTH, HELD_OUT, WARMUP = 4, 256, 4, 2
HERE = Path(__file__).resolve().parent


def main() -> None:
    arguments = parse()
    if arguments.kind is not None:
        print(json.dumps(measured(arguments)))
        return
    from tunesmith.jobs.environment import hardware, package_versions

    results = {}
    for kind in KINDS:
        results[kind] = start(kind, arguments)
        print(f"{kind}: {json.dumps(results[kind])}", flush=True)
    record = {
        "model": arguments.model,
        "device": arguments.device,
        "batch": [BATCH, LENGTH],
        "steps": arguments.steps,
        "bases": results,
        "hardware": hardware(),
        "versions": package_versions(),
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quantize.json")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one kind in a process of its own."""
    command = [sys.executable, __file__, "--kind", kind, "--model", arguments.model]
    command += ["--steps", str(arguments.steps), "--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{kind} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    import psutil
    import torch

    from tunesmith.engine.memory import peak_memory
    from tunesmith.methods import LoRA
    from tunesmith.methods.tuned import attach
    from tunesmith.models.loading import load_model
    from tunesmith.models.quantize import bytes_in_memory, require_quantiser
    from tunesmith.models.settings import ModelSettings

    device = torch.device(arguments.device)
    settings = ModelSettings.model_validate(
        {"name": arguments.model, "dtype": "bfloat16"} | KINDS[arguments.kind]
    )
    require_quantiser(settings, device)  # its libraries' memory is not the weights'
    before = psutil.Process().memory_info().rss
    model, tokenizer = load_model(settings, device=device)
    weights = bytes_in_memory(model.modules())
    rows = text_rows(tokenizer, BATCH + HELD_OUT).to(device)
    train, held_out = rows[:BATCH], rows[BATCH:]
    untuned = mean_loss(model, held_out)
    resident = psutil.Process().memory_info().rss - before
    torch.manual_seed(0)
    tuned = attach(model, LoRA(rank=16))
    seconds = take_steps(tuned, train, arguments.steps)
    return {
        "weights_bytes": weights,
        "resident_bytes": resident,
        "peak_bytes": peak_memory(device),
        "seconds_a_step": statistics.median(seconds[WARMUP:]),
        "loss_untuned": untuned,
        "loss_tuned": mean_loss(model, held_out),
        "loss_trained_on": mean_loss(model, train),
    }


def text_rows(tokenizer: Any, count: int) -> Any:
    """Return the first `count` rows of LENGTH tokens of the documentation, (count, LENGTH)."""
    import torch

    pages = sorted((HERE.parent / "docs").glob("**/*.md"))
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    ids = tokenizer(text)["input_ids"][: count * LENGTH]
    return torch.tensor(ids).reshape(count, LENGTH)


def mean_loss(model: Any, rows: Any) -> float:
    """Return the loss a token in nats, without dropout, row by row to keep memory low."""
    import torch

    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    return statistics.mean(losses)


def take_steps(tuned: Any, rows: Any, steps: int) -> list[float]:
    """Train on `rows` and return the seconds of each step."""
    import torch

    from tunesmith.objectives import SFT

    objective = SFT()
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=2e-4)
    batch = {"input_ids": rows, "labels": rows}
    seconds = []
    tuned.model.train()
    for _ in range(WARMUP + steps):
        started = time.perf_counter()
        terms = objective.loss(tuned.model, batch)
        torch.autograd.backward(terms.total / terms.count)
        optimizer.step()
        optimizer.zero_grad()
        if rows.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
