"""How well `tunesmith plan` predicts: `python bench/plan_accuracy.py` on a GPU.

Builds models of real shapes with weights of no meaning, takes two optimiser steps of each run on
the device, and puts the peak that PyTorch's allocator reports beside what the plan said from the
config alone. Writes bench/results/plan.json and prints the table.
"""

import gc
import json
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tunesmith.data.settings import DataSettings, Source
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.engine.recompute import recomputing
from tunesmith.engine.settings import EngineSettings, TrainSettings
from tunesmith.jobs.assemble import Program, attach_seeded, choose_dtypes
from tunesmith.jobs.environment import hardware, package_versions
from tunesmith.jobs.plan import plan
from tunesmith.methods import IA3, Adapter, Full, LoRA, PrefixTuning
from tunesmith.models.attention import enable_segments
from tunesmith.models.quantize import quantise
from tunesmith.models.settings import ModelSettings
from tunesmith.spec import Run

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("135M", LoRA(), {"batch": 16, "length": 256}),
    ("1B", LoRA(), {"batch": 4, "length": 1024}),
    ("1B", LoRA(), {"batch": 4, "length": 1024, "checkpointing": "full"}),
    ("1B", LoRA(), {"batch": 4, "length": 1024, "quantize": "nf4"}),
    ("1B", LoRA(), {"batch": 4, "length": 1024, "quantize": "int8"}),
    ("1B", Full(keep_base=False), {"batch": 4, "length": 1024}),
    ("1B", Full(keep_base=False), {"batch": 4, "length": 1024, "checkpointing": "full"}),
    ("1B", IA3(), {"batch": 4, "length": 1024}),
    ("1B", Adapter(), {"batch": 4, "length": 1024}),
    ("1B", PrefixTuning(init="random"), {"batch": 4, "length": 1024}),
    ("8B", LoRA(), {"batch": 2, "length": 1024}),
    ("8B", LoRA(), {"batch": 4, "length": 2048, "checkpointing": "full"}),
    ("8B", LoRA(), {"batch": 4, "length": 2048, "checkpointing": "full", "quantize": "nf4"}),
]


def run_of(folder: Path, method: Any, case: dict[str, Any]) -> Run:
    return Run(
        model=ModelSettings(name=str(folder), quantize=case.get("quantize", "none")),
        method=method,
        data=DataSettings(train=[Source(path="-")], max_length=case["length"]),
        train=TrainSettings(batch_size=case["batch"]),
        engine=EngineSettings(checkpointing=case.get("checkpointing", "none")),
    )


def measured(run: Run, config: LlamaConfig) -> int:
    """Return the peak bytes of two steps on the GPU."""
    device = torch.device("cuda")
    dtypes = choose_dtypes(run, device)
    # Quantising goes by way of the CPU, so that the plain weights are not counted.
    first = "cpu" if run.model.quantize != "none" else "cuda"
    with torch.device(first):
        model = AutoModelForCausalLM.from_config(config, dtype=dtypes.weights)
    if run.model.quantize != "none":
        quantise(model, run.model, device=device)
    gc.collect()
    torch.cuda.empty_cache()
    enable_segments(model)
    tuned = attach_seeded(model, run)
    model.train()
    torch.cuda.reset_peak_memory_stats()
    optimizer = build_optimizer(tuned.trainable(), run.train, learning_rate=1e-6)
    program = Program(model, run.objective)
    autocast = dtypes.autocast(mixed=any(p.attachment.trains_base for p in tuned.parts))
    with ExitStack() as stack:
        stack.enter_context(recomputing(model, run.engine))
        for _ in range(2):
            with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
                total = program(batch(run, device)).total
            total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated()


def batch(run: Run, device: torch.device) -> dict[str, Any]:
    """Return full rows as segments side by side, as training lays them out."""
    rows, length = run.train.batch_size, run.data.max_length
    ids = torch.randint(1000, (1, rows * length), device=device)
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    return {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.arange(length, device=device).repeat(rows)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": length,
        "max_length_k": length,
    }


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for shape, method, case in CASES:
            config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
            folder = Path(temporary) / shape
            config.save_pretrained(folder)
            run = run_of(folder, method, case)
            planned = plan(run, device="cuda")
            try:
                peak = measured(run, config)
            except torch.OutOfMemoryError as error:
                print(f"{shape} {method.name} {case}: {error}")
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            row = {
                "model": shape,
                "method": method.name,
                **case,
                "predicted_bytes": planned.alone.peak,
                "measured_bytes": peak,
                "ratio": planned.alone.peak / peak,
            }
            rows.append(row)
            print(
                f"{shape:>5} {method.name:<14} {case}: predicted "
                f"{planned.alone.peak / 2**30:.2f} GiB, measured {peak / 2**30:.2f} GiB, "
                f"ratio {row['ratio']:.3f}",
                flush=True,
            )
    written = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "hardware": hardware(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "plan.json"
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
