"""How well `tunesmith plan` predicts: python bench/plan_accuracy.py --device cuda (or cpu).

Builds models of real shapes with weights of no meaning on the device, takes steps of each run, and
puts the peak beside what the plan said from the config alone: on a GPU that of PyTorch's allocator,
on the CPU the resident memory of a process that does nothing else. Every case is written to
bench/results/plan.json and plan.md as soon as it is measured; cases of another device stay there.
--plan-again leaves what was measured and puts what this version plans beside it.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from plan_replies import measured_replies
from tunesmith.jobs.environment import hardware, package_versions
from tunesmith.jobs.plan import plan
from tunesmith.jobs.probe import ready
from tunesmith.objectives.sampling import FromReplies
from tunesmith.spec import Run, validate

RESULTS = Path(__file__).parent / "results"
PLANNERS = 6
"""Processes that plan while the GPU measures."""
SHAPES: dict[str, dict[str, Any]] = {
    "5M": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "6M": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    },
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "360M": {
        "vocab_size": 49152, "hidden_size": 960, "intermediate_size": 2560,
        "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5,
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
"""Two small ones, the second with as many key heads as query heads; those of SmolLM2 135M and 360M,
Llama 3.2 1B and Llama 3.1 8B."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "full": {"name": "full", "keep_base": False},
    "ia3": {"name": "ia3"},
    "adapter": {"name": "adapter"},
    "prefix_tuning": {"name": "prefix_tuning", "init": "random"},
    "dora": {"name": "lora", "dora": True},
    "houlsby": {"name": "adapter", "placement": "houlsby"},
}


@dataclass(frozen=True)
class Case:
    """One run."""

    shape: str
    method: str
    rows: int
    length: int
    checkpointing: str = "none"
    quantize: str = "none"
    optimizer: str = "adamw"
    speed: str = "safe"
    objective: str = "sft"
    """With the teacher's shape, or the replies written at once and the tokens of each."""


DEFAULT = Case("", "", 0, 0)
CASES = {
    "cuda": [
        Case("1B", "lora", 4, 1024),
        Case("1B", "lora", 4, 1024, "full"),
        Case("1B", "lora", 4, 1024, quantize="nf4"),
        Case("1B", "lora", 4, 1024, quantize="int8"),
        Case("1B", "lora", 4, 1024, "full", quantize="int8"),
        Case("1B", "full", 4, 1024),
        Case("1B", "full", 4, 1024, "full"),
        Case("1B", "full", 4, 1024, "full", optimizer="adamw_8bit"),
        Case("8B", "lora", 2, 1024),
        Case("8B", "lora", 4, 2048, "full"),
        Case("8B", "lora", 4, 2048, "full", quantize="nf4"),
        Case("8B", "lora", 2, 1024, quantize="nf4"),
        Case("8B", "full", 1, 1024, "full", optimizer="adamw_8bit"),
        Case("8B", "full", 1, 1024, "full"),
        Case("135M", "lora", 16, 256),
        Case("1B", "lora", 4, 1024, "selective"),
        Case("1B", "lora", 4, 1024, "offload"),
        Case("1B", "lora", 4, 1024, quantize="fp8"),
        Case("1B", "ia3", 4, 1024),
        Case("1B", "adapter", 4, 1024),
        Case("1B", "prefix_tuning", 4, 1024),
        Case("1B", "lora", 8, 512, objective="grpo 64 x 128"),
        Case("1B", "lora", 8, 512, objective="ppo 64 x 128"),
        Case("1B", "lora", 4, 1024, objective="distillation 1B"),
        Case("1B", "lora", 4, 1024, speed="compiled"),
        Case("8B", "lora", 4, 2048, speed="compiled"),
        Case("1B", "full", 4, 2048, speed="compiled"),
        Case("1B", "lora", 4, 1024, "full", quantize="nf4", speed="compiled"),
        Case("1B", "dora", 4, 1024, speed="compiled"),
        Case("1B", "ia3", 4, 1024, speed="compiled"),
        Case("1B", "houlsby", 4, 1024, speed="compiled"),
        Case("1B", "lora", 4, 1024, "selective", speed="compiled"),
    ],
    "cpu": [
        Case("5M", "lora", 4, 128),
        Case("135M", "lora", 4, 256),
        Case("135M", "full", 2, 256),
        Case("135M", "lora", 4, 256, "full"),
        Case("135M", "lora", 4, 256, quantize="nf4"),
        Case("135M", "full", 4, 256, "full"),
        Case("5M", "full", 8, 256),
        Case("135M", "lora", 4, 256, "full", quantize="nf4"),
        Case("6M", "lora", 8, 160, objective="ppo 64 x 64"),
        Case("6M", "lora", 32, 160, objective="grpo 64 x 32"),
        Case("135M", "lora", 4, 128, objective="grpo 8 x 32"),
        Case("135M", "lora", 2, 128, "full", objective="ppo 8 x 32"),
        Case("135M", "lora", 2, 256, objective="distillation 360M"),
        Case("135M", "lora", 2, 256, "full", objective="distillation 360M"),
    ],
}


def run_of(case: Case, folder: Path, device: str) -> Run:
    """Return the run of a case; `folder` holds the config of its shape."""
    return validate(
        {
            "model": {"name": str(folder / case.shape), "quantize": case.quantize},
            "method": METHODS[case.method],
            "data": {"train": [{"path": "-"}], "max_length": case.length},
            "train": {"batch_size": case.rows, "optimizer": case.optimizer},
            "engine": {
                "checkpointing": case.checkpointing, "device": device, "speed": case.speed,
            },
            "objective": objective_of(case, folder),
        },
        source="bench",
        lines={},
    )  # fmt: skip


def objective_of(case: Case, folder: Path) -> dict[str, Any]:
    """Return the objective of a case; the replies of a roll-out are written all at once."""
    name, *more = case.objective.split()
    if name == "distillation":
        return {"name": name, "teacher": {"name": str(folder / more[0])}}
    if name not in {"ppo", "grpo"}:
        return {"name": name}
    rows, _, tokens = more
    rollout = {"replies": int(rows), "batch_size": int(rows), "max_new_tokens": int(tokens)}
    rewards = [{"kind": "length", "free": 0, "limit": 100, "unit": "characters"}]
    return {"name": name, "rewards": rewards, "rollout": rollout, "epochs": 1}


def predicted(case: Case, folder: Path, device: str) -> int:
    return plan(run_of(case, folder, device), device=device).alone.peak


def measured(case: Case, folder: Path, device: str) -> int:
    """Return the peak bytes of a step, after one that sets everything up."""
    run = run_of(case, folder, device)
    if isinstance(run.objective, FromReplies):
        return measured_replies(run, torch.device(device))
    with ready(run, torch.device(device), real_weights=False) as stage:
        stage.step(case.rows, case.length)
        return stage.measured(case.rows, case.length)[1]


def without_gpu() -> None:
    """Keep a process that plans off the GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def measure_cuda(cases: Sequence[Case], folder: Path, book: "Book") -> None:
    """Measure one case after the other in this process, while others plan."""
    with ProcessPoolExecutor(PLANNERS, get_context("spawn"), without_gpu) as planners:
        plans = [planners.submit(predicted, case, folder, "cuda") for case in cases]
        for case, planned in zip(cases, plans, strict=True):
            started, peak, why = time.perf_counter(), None, None
            try:
                peak = measured(case, folder, "cuda")
            except Exception as error:  # noqa: BLE001 - a row that says why; the others go on
                why = f"{type(error).__name__}: {error}".splitlines()[0]
            # After the except clause, which held the frames and with them the model.
            gc.collect()
            torch.cuda.empty_cache()
            book.add(case, planned.result(), peak, why=why, since=started)


def measure_cpu(cases: Sequence[Case], folder: Path, book: "Book") -> None:
    """Plan and measure each case in processes of their own, whose memory is theirs alone."""
    for case in cases:
        started = time.perf_counter()
        values = []
        for function in (predicted, measured):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                values.append(process.submit(function, case, folder, "cpu").result())
        book.add(case, *values, why=None, since=started)


def plan_again(folder: Path, device: str) -> None:
    """Replace the predictions of what was measured on `device`, wherever this runs."""
    book = Book(device, keep=True)
    cases = [Case(**{key: row[key] for key in asdict(DEFAULT)}) for row in book.rows]
    with ProcessPoolExecutor(
        2, get_context("spawn"), without_gpu, max_tasks_per_child=1
    ) as planners:  # fresh ones, whose own memory is alike
        plans = [planners.submit(predicted, case, folder, device) for case in cases]
        for row, planned in zip(book.rows, plans, strict=True):
            row["predicted_bytes"] = planned.result()
            if row["measured_bytes"]:
                row["ratio"] = round(row["predicted_bytes"] / row["measured_bytes"], 3)
            print(row, flush=True)
    book.write()


class Book:
    """The results of all devices on disk."""

    def __init__(self, device: str, *, keep: bool = False) -> None:
        self.path = RESULTS / "plan.json"
        self.device = device
        self.all: dict[str, Any] = {}
        if self.path.exists():
            self.all = json.loads(self.path.read_text(encoding="utf-8"))
        self.rows: list[dict[str, Any]] = []
        if keep and device in self.all:
            # Cases have had more settings from time to time.
            self.rows = [asdict(DEFAULT) | row for row in self.all[device]["rows"]]
            self.all[device]["rows"] = self.rows
            return
        self.all[device] = {
            "hardware": hardware(),
            "versions": package_versions(),
            "rows": self.rows,
        }

    def add(
        self, case: Case, planned: int, peak: int | None, *, why: str | None, since: float
    ) -> None:
        """Write a case down: bytes, or why there are none."""
        self.rows[:] = [row for row in self.rows if asdict(case).items() - row.items()]
        row = asdict(case) | {"predicted_bytes": planned, "measured_bytes": peak}
        row |= {"ratio": round(planned / peak, 3)} if peak else {"not_measured": why}
        self.rows.append(row)
        self.write()
        print(f"{time.perf_counter() - since:6.1f} s  {row}", flush=True)

    def write(self) -> None:
        """Write plan.json and plan.md."""
        self.path.write_text(json.dumps(self.all, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "plan.md").write_text(table(self.all), encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """Return what was predicted beside what was measured, as Markdown."""
    lines = ["# Predicted and measured peak memory", ""]
    lines += ["Written by `python bench/plan_accuracy.py`.", ""]
    for device, result in results.items():
        versions = ", ".join(f"{k} {v}" for k, v in sorted(result["versions"].items()))
        lines += [f"## {device}", "", f"{_named(result['hardware'])}; {versions}.", ""]
        if "remark" in result:
            lines += [result["remark"], ""]
        lines += [
            "| shape | method | objective | rows x tokens | checkpointing | base | optimiser "
            "| blocks | predicted | measured | ratio |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in result["rows"]]
        lines.append("")
    return "\n".join(lines)


def _named(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in facts.items())


def _line(row: dict[str, Any]) -> str:
    sizes = [f"{row['predicted_bytes'] / 2**30:.2f} GiB", f"not run: {row.get('not_measured')}", ""]
    if row["measured_bytes"]:
        sizes[1:] = [f"{row['measured_bytes'] / 2**30:.2f} GiB", f"{row['ratio']:.3f}"]
    settings = (row[key] for key in ("checkpointing", "quantize", "optimizer", "speed"))
    objective = row.get("objective", DEFAULT.objective)
    head = [row["shape"], row["method"], objective, f"{row['rows']} x {row['length']}", *settings]
    return "| " + " | ".join([*head, *sizes]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=CASES, default="cuda")
    parser.add_argument("--first", type=int, help="only so many cases")
    parser.add_argument("--speed", choices=("safe", "compiled"), help="only cases of this speed")
    parser.add_argument(
        "--objective", nargs="*", help="only cases of these: sft, ppo, grpo, distillation"
    )
    parser.add_argument("--plan-again", action="store_true", help="only the predictions")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, shape in SHAPES.items():
            LlamaConfig(**shape, max_position_embeddings=8192).save_pretrained(folder / name)
        if options.plan_again:
            plan_again(folder, options.device)
            return
        measure = measure_cuda if options.device == "cuda" else measure_cpu
        cases = [c for c in CASES[options.device] if options.speed in {None, c.speed}]
        if options.objective:
            cases = [c for c in cases if c.objective.split()[0] in options.objective]
        book = Book(options.device, keep=bool(options.speed or options.objective))
        measure(cases[: options.first], folder, book)


if __name__ == "__main__":
    main()
