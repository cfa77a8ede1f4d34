"""The table of gpu_sft.py: its rows, the order in which they are measured, and the page."""

import json
import re
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
    over_peer: float | None = None
    """Times the rate of the best peer to reach."""
    steps: int | None = None
    """Timed steps, where they are long."""


BASE = Job(speed="auto")
FP8 = Job(speed="auto", quantize="fp8")


def variants(job: Job, *modes: str) -> tuple[Job, ...]:
    """Return `job` with each way of checkpointing."""
    return tuple(Job(**asdict(job) | {"checkpointing": mode}) for mode in modes)


def beside(method: str) -> tuple[Job, ...]:
    """Return the job of the first row with another method."""
    return (Job(speed="auto", method=method),)


NF4 = Job(speed="auto", quantize="nf4", products="float8")
LONG = Job(speed="auto", tokens="1x32768")
FULL = Job(speed="auto", shape="1b", method="full")
ALPACA_PEER = ("trl-liger", "--gc", "0", "--data", "alpaca")
# In the order of their importance: where time is short, the last are left out.
ROWS = {
    "lora-bf16": Row(
        "LoRA, bf16 base, memory free",
        (BASE,),
        target=17_000,
        limit=52,
        peers=(("trl-liger", "--gc", "0"),),
    ),
    "full-1b": Row(
        "full fine-tuning, 1B shape (the peer keeps weights and moments in bf16)",
        (Job(**asdict(FULL) | {"method": "full-bf16", "dtype": "bfloat16"}), FULL),
        target=80_000,
        limit=18,
        peers=(("trl-liger", "--model", "1b", "--mode", "full", "--gc", "0"),),
    ),
    "lora-fp8": Row("LoRA, fp8 base, memory free", (FP8,), target=25_000, limit=46),
    "lora-20": Row(
        "LoRA within 20 GiB",
        variants(Job(speed="auto", quantize="fp8", limit=20.0), "attention", "auto"),
        target=17_000,
        limit=20,
        peers=(("trl-liger", "--gc", "1"),),
    ),
    "qlora": Row(
        "QLoRA, nf4 with double quantisation, within 9.1 GiB",
        variants(NF4, "offload"),
        target=13_500,
        limit=9.1,
        peers=(("trl-liger", "--mode", "qlora"),),
    ),
    "long": Row(
        "one sequence of 32,768 tokens",
        variants(Job(**asdict(LONG) | {"quantize": "fp8", "limit": 40.0}), "attention", "auto"),
        target=8_500,
        limit=40,
        peers=(("trl-liger", "--bs", "1", "--seq", "32768"),),
        steps=3,
    ),
    "alpaca": Row(
        "instruction data (lengths of Alpaca), packed; supervised tokens",
        (Job(speed="auto", data="alpaca"), Job(speed="auto", data="alpaca", quantize="fp8")),
        peers=(
            (*ALPACA_PEER, "--bs", "16", "--group", "1"),
            (*ALPACA_PEER, "--bs", "4", "--packing", "1"),
        ),
        unit="supervised_tokens_per_second",
        over_peer=3.0,
    ),
    "prefix": Row("prefix tuning, 20", beside("prefix"), ratio=1.1),
    "dora": Row("DoRA", beside("dora"), ratio=1.15),
    "start": Row(
        "seconds from the start of the program to the end of the first step, weights not from disk",
        (Job(**asdict(BASE) | {"steps": 1}),),
        peers=(("trl-liger", "--gc", "0", "--steps", "1"),),
        unit="start_seconds",
        steps=1,
    ),
    "ia3": Row("IA3", beside("ia3"), ratio=1.1),
    "adapter": Row("Houlsby adapter", beside("adapter"), ratio=1.1),
}


def run_table(arguments: Namespace) -> None:
    """Measure the rows that were asked for, peers and ours in turn, and write the page."""
    chosen = arguments.rows.split(",") if arguments.rows else list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        sys.exit(f"--rows: {unknown[0]!r} is not among {', '.join(ROWS)}")
    worker = Worker()
    end = time.monotonic() + arguments.budget
    for name in chosen:
        if time.monotonic() > end:
            print(f"left out for want of time: {name}", flush=True)
            continue
        row = ROWS[name]
        steps = row.steps or arguments.steps
        peers = wanted_peers(name, arguments)
        if row.unit == "start_seconds":
            worker.stop()  # a process that has imported everything would start too soon
        for number in range(max(len(row.jobs), len(peers))):
            if number < len(peers):
                found = by_peer(peers[number], steps, arguments.timeout)
                tell(name, found, arguments.results)
            if number < len(row.jobs):
                job = Job(**asdict(row.jobs[number]) | overrides(arguments, steps))
                found = worker.measure(job, timeout=arguments.timeout)
                tell(name, {"program": "tunesmith"} | found, arguments.results)
    worker.stop()
    write_page(arguments.results, machine()["device_name"])


def wanted_peers(name: str, arguments: Namespace) -> list[tuple[str, ...]]:
    """Return the peers of a row that are to be measured now."""
    if arguments.peers == "none" or arguments.device == "cpu":
        return []
    if arguments.peers == "all":
        return list(ROWS[name].peers)
    path, here = arguments.results / "gpu_sft.json", machine()["device_name"]
    known = json.loads(path.read_text("utf-8")) if path.exists() else []
    there = {
        (line["program"], *line["arguments"])
        for line in known
        if line.get("row") == name and line["device_name"] == here and "arguments" in line
    }
    return [peer for peer in ROWS[name].peers if peer not in there]


def overrides(arguments: Namespace, steps: int) -> dict[str, Any]:
    """Return what the command line says of every row: a tiny shape and the CPU, for a trial."""
    changed: dict[str, Any] = {"steps": steps, "device": arguments.device}
    if arguments.shape == "tiny":
        changed |= {"shape": "tiny", "tokens": arguments.tokens}
    if arguments.device == "cpu":
        changed["limit"] = None
    return changed


def by_peer(peer: tuple[str, ...], steps: int, timeout: float) -> dict[str, Any]:
    """Return what a peer measured in a process of its own, or why not."""
    command = [sys.executable, str(HERE / "gpu_peers.py"), *peer, "--steps", str(steps)]
    known = {"program": peer[0], "arguments": list(peer[1:])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return known | {"failed": f"no result after {timeout:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return known | json.loads(line.removeprefix("RESULT "))
    said = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    # A progress bar may be cut short after the error.
    why = next(
        (line for line in reversed(said) if re.match(r"[\w.]+(Error|Exception)\b", line)), said[-1]
    )
    return known | {"failed": why[:300]}


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
    "start_seconds",
    "compile_seconds",
    "loss_first",
    "loss_last",
    "said",
    "failed",
)


def write_page(folder: Path, device_name: str) -> None:
    """Write <device>.md in `folder` from the newest results of a device."""
    known = json.loads((folder / "gpu_sft.json").read_text(encoding="utf-8"))
    mine = [line for line in known if line["device_name"] == device_name and "row" in line]
    path = folder / f"{device_slug(device_name)}.md"
    path.write_text(page(mine), encoding="utf-8")
    print(path)


def page(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    last = max(results, key=lambda line: line["date"])
    newest: dict[str, dict[str, Any]] = {}
    for line in results:
        row = ROWS.get(line["row"])
        if row is not None and key_of(line) in keys_of(row):
            newest[line["row"] + key_of(line)] = line
    lines = [
        f"# Supervised fine-tuning on one {last['device_name']}",
        "",
        "Written by `python bench/gpu_sft.py --table` on "
        f"{last['date']}; every run is in gpu_sft.json.",
        "Llama 3.1 8B shape with random weights, rank 16 on all linear maps, AdamW, 4 x 2048",
        "tokens, all supervised, unless the row says otherwise; medians of 8 steps (3 of the long",
        "sequence) after 3 of warm-up; peak memory that PyTorch allocated in the timed steps. The",
        "first step of a peer includes its imports, ours does not; both make random weights.",
        "",
        "| job | program | base | checkpointing | tokens/s | peak GiB | first step | asked | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        mine = [line for line in newest.values() if line["row"] == name]
        ours = [line for line in mine if line["program"] == "tunesmith"]
        theirs = [line for line in mine if line["program"] != "tunesmith"]
        order = sorted(theirs, key=lambda x: -(x.get(row.unit) or 0.0))
        order += sorted(ours, key=lambda x: -(x.get(row.unit) or 0.0))
        lines += [cells(row, line, list(newest.values())) for line in order]
    versions = ", ".join(f"{key} {value or '-'}" for key, value in last["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def key_of(line: dict[str, Any]) -> str:
    """Return what tells a way to do the job of a row from the others."""
    if line["program"] != "tunesmith":
        return json.dumps([line["program"], *line["arguments"]])
    # Tried out on a CPU, the shape is smaller.
    given = {**asdict(BASE), **line}
    apart = (
        "method",
        "quantize",
        "products",
        "checkpointing",
        "data",
        "speed",
        "dtype",
        "optimizer",
    )
    return json.dumps({name: given[name] for name in apart})


def keys_of(row: Row) -> set[str]:
    """Return the ways to do the job of `row` that are measured now."""
    ours = {key_of(asdict(job) | {"program": "tunesmith"}) for job in row.jobs}
    return ours | {json.dumps(list(peer)) for peer in row.peers}


def cells(row: Row, line: dict[str, Any], every: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    how = [line.get("quantize", " ".join(line.get("arguments", []))), line.get("checkpointing", "")]
    if line.get("products", "dtype") != "dtype":
        how[0] += f", products in {line['products']}"
    if line.get("dtype", "auto") != "auto":
        how[0] += f", {line['dtype']}"
    start = [row.about, line["program"], *how]
    if "failed" in line or line.get(row.unit) is None:
        why = line.get("failed", "not measured").replace("|", "/")
        return f"| {' | '.join(start)} | - | - | - | | {why} |"
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
        return asked, f"{ratio:.2f} x: {verdict(ratio <= row.ratio)}"
    if row.over_peer is not None or row.unit == "start_seconds":
        return beside_peers(row, line, every)
    if row.target is None:
        return "", ""
    asked = f"{row.target:,.0f} at {row.limit} GiB"
    good = line[row.unit] >= row.target and line["peak_gib"] <= (row.limit or float("inf"))
    return asked, verdict(good)


def beside_peers(row: Row, line: dict[str, Any], every: list[dict[str, Any]]) -> tuple[str, str]:
    """Return what was asked of a result in comparison with the best peer, and whether it holds."""
    peers = [x for x in every if x["row"] == line["row"] and x["program"] != "tunesmith"]
    theirs = [x[row.unit] for x in peers if x.get(row.unit)]
    asked = "no slower than the peer"
    if row.over_peer is not None:
        asked = f"{row.over_peer:g} x the best peer"
    if not theirs:
        return asked, "no peer to compare"
    if row.over_peer is None:
        return asked, verdict(line[row.unit] <= min(theirs))
    times = line[row.unit] / max(theirs)
    return asked, f"{times:.2f} x: {verdict(times >= row.over_peer)}"


def verdict(reached: bool) -> str:
    """Return it in words."""
    return "reached" if reached else "not reached"
