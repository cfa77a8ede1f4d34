"""The table of gpu_sft.py: its rows, the order in which they are measured, and the page."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_job import Job
from gpu_sft import HERE, Worker, device_slug, machine, record


@dataclass(frozen=True)
class Row:
    """A line of the table: a job, ways to do it here, and how a peer is started."""

    about: str
    jobs: tuple[Job, ...]
    """The fastest that keeps to `limit` is shown."""
    target: float | None = None
    """Tokens per second to reach."""
    limit: float | None = None
    """GiB allowed."""
    ratio: float | None = None
    """Step time allowed, over that of the row lora-bf16."""
    peers: tuple[tuple[str, ...], ...] = ()
    """Arguments of gpu_peers.py."""
    unit: str = "tokens_per_second"


BASE = Job(speed="auto")
FP8 = Job(speed="auto", quantize="fp8")


def variants(job: Job, *modes: str) -> tuple[Job, ...]:
    """Return `job` with each way of checkpointing."""
    return tuple(Job(**asdict(job) | {"checkpointing": mode}) for mode in modes)


def beside(method: str) -> tuple[Job, ...]:
    """Return the job of the first row with another method."""
    return (Job(speed="auto", method=method),)


NF4 = Job(speed="auto", quantize="nf4")
LONG = Job(speed="auto", tokens="1x32768")
LONG_FP8 = Job(speed="auto", quantize="fp8", tokens="1x32768")
FULL = Job(speed="auto", shape="1b", method="full")
ROWS = {
    "lora-bf16": Row(
        "LoRA, bf16 base, memory free",
        (BASE,),
        target=17_000,
        limit=52,
        peers=(("trl-liger", "--gc", "0"), ("trl", "--gc", "0"), ("unsloth", "--gc", "0")),
    ),
    "lora-fp8": Row("LoRA, fp8 base, memory free", (FP8,), target=25_000, limit=46),
    "lora-20": Row(
        "LoRA within 20 GiB",
        variants(FP8, "selective", "offload", "full"),
        target=17_000,
        limit=20,
        peers=(("trl-liger", "--gc", "1"), ("unsloth", "--gc", "1")),
    ),
    "qlora": Row(
        "QLoRA, nf4 with double quantisation, within 9.1 GiB",
        variants(NF4, "offload", "full"),
        target=13_500,
        limit=9.1,
        peers=(("trl-liger", "--mode", "qlora"), ("unsloth", "--mode", "qlora")),
    ),
    "full-1b": Row(
        "full fine-tuning, 1B shape",
        (FULL, Job(**asdict(FULL) | {"dtype": "bfloat16"})),
        target=80_000,
        limit=18,
        peers=(
            ("trl-liger", "--model", "1b", "--mode", "full", "--gc", "0"),
            ("unsloth", "--model", "1b", "--mode", "full", "--gc", "0"),
        ),
    ),
    "dora": Row("DoRA", beside("dora"), ratio=1.15, peers=(("trl", "--gc", "0", "--dora", "1"),)),
    "ia3": Row("IA3", beside("ia3"), ratio=1.1),
    "prefix": Row("prefix tuning, 20", beside("prefix"), ratio=1.1),
    "adapter": Row("Houlsby adapter", beside("adapter"), ratio=1.1),
    "alpaca": Row(
        "instruction data (lengths of Alpaca), packed; supervised tokens",
        (Job(speed="auto", data="alpaca"),),
        peers=(("trl-liger", "--gc", "0", "--data", "alpaca", "--bs", "32"),),
        unit="supervised_tokens_per_second",
    ),
    "long": Row(
        "one sequence of 32,768 tokens",
        (*variants(LONG_FP8, "selective", "full"), *variants(LONG, "full", "offload")),
        target=8_500,
        limit=40,
        peers=(("trl-liger", "--bs", "1", "--seq", "32768"),),
    ),
}


def run_table(arguments: Namespace) -> None:
    """Measure the rows that were asked for, peers and ours in turn, and write the page."""
    chosen = arguments.rows.split(",") if arguments.rows else list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        sys.exit(f"--rows: {unknown[0]!r} is not among {', '.join(ROWS)}")
    worker = Worker()
    for name in chosen:
        row = ROWS[name]
        peers = [] if arguments.no_peers or arguments.device == "cpu" else list(row.peers)
        for number in range(max(len(row.jobs), len(peers))):
            if number < len(peers):
                tell(name, by_peer(peers[number], arguments), arguments.results)
            if number < len(row.jobs):
                job = Job(**asdict(row.jobs[number]) | overrides(arguments))
                found = worker.measure(job, timeout=arguments.timeout)
                tell(name, {"program": "tunesmith"} | found, arguments.results)
    worker.stop()
    write_page(arguments.results)


def overrides(arguments: Namespace) -> dict[str, Any]:
    """Return what the command line says of every row: a tiny shape and the CPU, for a trial."""
    changed: dict[str, Any] = {"steps": arguments.steps, "device": arguments.device}
    if arguments.shape == "tiny":
        changed |= {"shape": "tiny", "tokens": arguments.tokens}
    return changed


def by_peer(peer: tuple[str, ...], arguments: Namespace) -> dict[str, Any]:
    """Return what a peer measured in a process of its own, or why not."""
    command = [sys.executable, str(HERE / "gpu_peers.py"), *peer, "--steps", str(arguments.steps)]
    known = {"program": peer[0], "arguments": list(peer[1:])}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=arguments.timeout
        )
    except subprocess.TimeoutExpired:
        return known | {"failed": f"no result after {arguments.timeout:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return known | json.loads(line.removeprefix("RESULT "))
    error = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    return known | {"failed": error[-1][:300]}


def tell(name: str, result: dict[str, Any], folder: Path) -> None:
    """Record a result of a row and say it."""
    whole = record({"row": name} | result, folder)
    short = {key: whole[key] for key in SHOWN if key in whole}
    print(json.dumps(short), flush=True)


SHOWN = (
    "row",
    "program",
    "quantize",
    "checkpointing",
    "dtype",
    "arguments",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "peak_gib",
    "first_step_seconds",
    "compile_seconds",
    "loss_first",
    "loss_last",
    "said",
    "failed",
)


def write_page(folder: Path) -> None:
    """Write <device>.md in `folder` from the newest results of the device at hand."""
    here = machine()
    known = json.loads((folder / "gpu_sft.json").read_text(encoding="utf-8"))
    mine = [line for line in known if line["device_name"] == here["device_name"] and "row" in line]
    path = folder / f"{device_slug(here['device_name'])}.md"
    path.write_text(page(mine, here), encoding="utf-8")
    print(path)


def page(results: list[dict[str, Any]], here: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    newest: dict[str, dict[str, Any]] = {}
    for line in results:
        if line["program"] == "tunesmith":
            key = {name: line.get(name) for name in asdict(BASE)}
        else:
            key = {"peer": line["program"], "arguments": line["arguments"]}
        newest[line["row"] + json.dumps(key)] = line
    lines = [
        f"# Supervised fine-tuning on one {here['device_name']}",
        "",
        "Written by `python bench/gpu_sft.py --table` on "
        f"{time.strftime('%Y-%m-%d')}; every run is in gpu_sft.json.",
        "Llama 3.1 8B shape with random weights, rank 16 on all linear maps, AdamW, 4 x 2048",
        "tokens, all supervised, unless the row says otherwise; medians of at least 8 steps after",
        "3 of warm-up; peak memory that PyTorch allocated in the timed steps.",
        "",
        "| job | program | base | checkpointing | tokens/s | peak GiB | first step | asked | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        mine = [line for line in newest.values() if line["row"] == name]
        ours = [line for line in mine if line["program"] == "tunesmith"]
        theirs = [line for line in mine if line["program"] != "tunesmith"]
        order = sorted(theirs, key=lambda x: -x.get(row.unit, 0.0))
        order += sorted(ours, key=lambda x: -x.get(row.unit, 0.0))
        lines += [cells(row, line, list(newest.values())) for line in order]
    versions = ", ".join(f"{key} {value or '-'}" for key, value in here["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def cells(row: Row, line: dict[str, Any], every: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    how = [line.get("quantize", " ".join(line.get("arguments", []))), line.get("checkpointing", "")]
    if line.get("dtype", "auto") != "auto":
        how[0] += f", {line['dtype']}"
    start = [row.about, line["program"], *how]
    if "failed" in line:
        return f"| {' | '.join(start)} | - | - | - | | {line['failed'].replace('|', '/')} |"
    numbers = [f"{line[row.unit]:,.0f}", f"{line['peak_gib']:.1f}"]
    numbers.append(f"{line['first_step_seconds']:.0f} s" if "first_step_seconds" in line else "")
    asked, verdict = judged(row, line, every)
    return f"| {' | '.join([*start, *numbers, asked, verdict])} |"


def judged(row: Row, line: dict[str, Any], every: list[dict[str, Any]]) -> tuple[str, str]:
    """Return what was asked of a result, and whether it holds."""
    if line["program"] != "tunesmith":
        return "", ""
    if row.ratio is not None:
        base = [x for x in every if x["row"] == "lora-bf16" and x["program"] == "tunesmith"]
        asked = f"{row.ratio} x LoRA"
        if not base or "failed" in base[0]:
            return asked, "no LoRA to compare"
        ratio = line["step_seconds"] / base[0]["step_seconds"]
        return asked, f"{ratio:.2f} x: {'reached' if ratio <= row.ratio else 'not reached'}"
    if row.target is None:
        return "", ""
    asked = f"{row.target:,.0f} at {row.limit} GiB"
    good = line[row.unit] >= row.target and line["peak_gib"] <= (row.limit or float("inf"))
    return asked, "reached" if good else "not reached"
