"""The same supervised fine-tuning job by TRL + PEFT and by Tunesmith, on a CPU.

    python bench/cpu_sft.py [--steps 12] [--rounds 3] [--data alpaca.jsonl]

SmolLM2-135M-Instruct in bfloat16, LoRA of rank 16 on all linear maps of the blocks, AdamW, batches
of 4 conversations of at most 256 tokens with loss on the reply only, no packing, no gradient
checkpointing; the same rows in the same order. Each round runs one process of each side, one after
the other, so that both see the same machine. Writes bench/results/cpu_sft.json.

Tokens per second count real tokens (no padding) over the median step after the warm-up steps; of
each side's rounds the fastest counts, since whatever else runs on the machine only slows a round
down. `other_cores` is how many cores other programs kept busy meanwhile: a result with more than
0.1 of them is not worth quoting. Memory is the peak resident set of the process. TRL supervises one
token more in each row, the line feed that the template puts after the end of the turn.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

MODEL = "smollm2-135m-instruct"
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
BATCH, MAX_LENGTH, MIN_LENGTH = 4, 256, 128
WARMUP = 3
SIDES = ("trl", "tunesmith")
HERE = Path(__file__).resolve().parent
ALPACA = HERE.parents[1] / "shared" / "data" / "alpaca_en" / "train.jsonl"


def main() -> None:
    arguments = parse()
    if arguments.side is not None:
        result = work(arguments.side, arguments.data, arguments.steps, autocast=arguments.autocast)
        arguments.out.write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        facts = choose_rows(arguments.data, data, BATCH * arguments.steps)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for number in range(arguments.rounds):
            for side in SIDES:
                runs[side].append(start(side, data, arguments))
                print(f"round {number + 1} {side}: {in_words(runs[side][-1])}", flush=True)
    report(runs, facts, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ALPACA, help="alpaca rows as JSON lines")
    parser.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="TRL: bf16=True, its default; it was the faster one",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu_sft.json")
    return parser.parse_args()


def choose_rows(source: Path, target: Path, count: int) -> dict[str, Any]:
    """Write the first `count` rows of MIN_LENGTH to MAX_LENGTH tokens as conversations."""
    from tunesmith.models.loading import load_tokenizer
    from tunesmith.models.settings import ModelSettings

    tokenizer = load_tokenizer(ModelSettings(name=MODEL))
    lengths: list[int] = []
    with source.open(encoding="utf-8") as rows, target.open("w", encoding="utf-8") as chosen:
        for row in map(json.loads, rows):
            question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": row["output"]},
            ]
            length = len(tokenizer.apply_chat_template(turns, return_dict=False))
            if MIN_LENGTH <= length <= MAX_LENGTH and len(lengths) < count:
                lengths.append(length)
                chosen.write(json.dumps({"messages": turns}) + "\n")
    if len(lengths) < count:
        sys.exit(f"{source}: only {len(lengths)} rows have {MIN_LENGTH} to {MAX_LENGTH} tokens")
    padded = sum(BATCH * max(lengths[i : i + BATCH]) for i in range(0, count, BATCH))
    return {"rows": count, "tokens": sum(lengths), "padding_share": 1 - sum(lengths) / padded}


def start(side: str, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a process of its own."""
    out = data.with_name("result.json")
    command = [sys.executable, __file__, "--side", side, "--data", data, "--out", out]
    command += [
        "--steps",
        str(arguments.steps),
        "--autocast" if arguments.autocast else "--no-autocast",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    begin = usage()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(out.read_text())
    wall, busy, ours = (after - before for before, after in zip(begin, usage(), strict=True))
    return result | {"other_cores": max(0.0, busy - ours) / wall}


def usage() -> tuple[float, float, float]:
    """Return the clock, and the processor seconds of the whole machine and of our processes."""
    cpu, children = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = sum(cpu) - cpu.idle - getattr(cpu, "iowait", 0.0)
    return time.perf_counter(), busy, children.ru_utime + children.ru_stime


def work(side: str, data: Path, steps: int, *, autocast: bool) -> dict[str, Any]:
    """Run one side in this process and return what was measured."""
    import torch

    from tunesmith.engine.memory import peak_memory

    with tempfile.TemporaryDirectory() as folder:
        if side == "trl":
            steps_done = by_trl(data, steps, folder, autocast=autocast)
        else:
            steps_done = by_tunesmith(data, steps, folder)
    tokens, losses, ends = map(list, zip(*steps_done, strict=True))
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    rates = [count / time for count, time in zip(tokens[1:], seconds, strict=True)]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": statistics.median(rates[WARMUP - 1 :]),
        "peak_bytes": peak_memory(torch.device("cpu")),
        "losses": losses,
    }


# Real tokens, loss, and the clock at the step's end.
Step = tuple[int, float, float]


def by_trl(data: Path, steps: int, folder: str, *, autocast: bool) -> list[Step]:
    """Return the steps of SFTTrainer in its best settings here."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tunesmith.models.loading import load_model

    loaded = load_model(MODEL, dtype=torch.bfloat16)
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    tokens: list[int] = []
    losses: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer = SFTTrainer(
        model=loaded.model,
        processing_class=loaded.tokenizer,
        train_dataset=Dataset.from_list([{"prompt": r[:1], "completion": r[1:]} for r in rows]),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"),
        callbacks=[Clock()],
        args=SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            max_length=MAX_LENGTH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            bf16=autocast,
            use_cpu=True,
            gradient_checkpointing=False,
            completion_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    )
    collate = trainer.data_collator

    def counting(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(examples)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    # The loader is ahead by a batch.
    return list(zip(tokens[:steps], losses, ends, strict=True))


def by_tunesmith(data: Path, steps: int, folder: str) -> list[Step]:
    """Return the steps of the ordinary `tunesmith.train`."""
    import tunesmith as ts
    from tunesmith.engine.events import Event, StepDone

    done: list[Step] = []

    def clock(event: Event) -> None:
        if isinstance(event, StepDone):
            done.append((event.tokens, event.loss, time.perf_counter()))

    run = ts.Run(
        name="bench",
        output=folder,
        model=ts.ModelSettings(name=MODEL, dtype="bfloat16"),
        method=ts.LoRA(rank=RANK, alpha=ALPHA),
        data=ts.DataSettings(
            train=[ts.Source(path=str(data))], max_length=MAX_LENGTH, shuffle=False
        ),
        train=ts.TrainSettings(
            max_steps=steps,
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup=0,
        ),
        engine=ts.EngineSettings(device="cpu"),
    )
    ts.train(run, listeners=[clock])
    return done


def in_words(run: dict[str, Any]) -> str:
    return (
        f"{run['tokens_per_second']:.0f} tokens/s, peak {run['peak_bytes'] / 2**20:.0f} MiB, "
        f"loss {run['losses'][0]:.4f} -> {run['losses'][-1]:.4f}, "
        f"others took {run['other_cores']:.2f} cores"
    )


def report(
    runs: dict[str, list[dict[str, Any]]], facts: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """Print the ratios and write everything measured."""
    best = {
        "tokens_per_second": {s: max(run["tokens_per_second"] for run in runs[s]) for s in SIDES},
        "peak_bytes": {s: min(run["peak_bytes"] for run in runs[s]) for s in SIDES},
    }
    ratios = {key: value["tunesmith"] / value["trl"] for key, value in best.items()}
    print(f"tokens/s {ratios['tokens_per_second']:.2f} x TRL's (target at least 1.3)")
    print(f"peak memory {ratios['peak_bytes']:.2f} x TRL's (target at most 0.8)")
    result = {
        "job": f"{MODEL}, LoRA r={RANK} on all linears, {BATCH} x at most {MAX_LENGTH} tokens",
        "data": facts,
        "trl_autocast": arguments.autocast,
        "best_rounds": best,
        "ratios": ratios,
        "machine": machine(),
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def machine() -> dict[str, Any]:
    import torch

    from tunesmith.jobs.environment import processor_name

    names = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": "avx512_bf16" in Path("/proc/cpuinfo").read_text(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
