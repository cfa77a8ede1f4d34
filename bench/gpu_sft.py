"""The speed and memory of supervised fine-tuning on one GPU.

    python bench/gpu_sft.py --shape 8b --method lora --quantize fp8 --checkpointing none
    python bench/gpu_sft.py --table [--rows lora-bf16,lora-fp8] [--peers missing] [--budget 480]

Random weights of a real shape, made on the device, go through the code of `tunesmith train`. One
configuration prints a line of JSON and adds it to bench/results/gpu_sft.json. --table runs the rows
of bench/gpu_table.py, each beside its peer (bench/gpu_peers.py), and writes
bench/results/<device>.md. Tokens per second are of the median step of `--steps` after three steps
of warm-up; memory is the peak that PyTorch allocated in them.
"""

import argparse
import json
import os
import re
import select
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE))
# Blocks of many sizes come and go; without this the peak would count gaps between them.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "trl", "peft", "liger-kernel")


def main() -> None:
    arguments = parse()
    if arguments.worker:
        work()
        return
    if arguments.page:
        from gpu_table import write_page

        write_page(arguments.results, arguments.page)
        return
    if arguments.table or arguments.rows:
        from gpu_table import run_table

        run_table(arguments)
        return
    from gpu_job import Job, measure
    from tunesmith.errors import TunesmithError

    job = Job(**{field.name: getattr(arguments, field.name) for field in fields(Job)})
    try:
        result = {"program": "tunesmith"} | measure(job, profile=arguments.profile)
    except TunesmithError as error:
        sys.exit(str(error))
    print(json.dumps(record(result, arguments.results)), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b", choices=("8b", "1b", "tiny"))
    parser.add_argument(
        "--method",
        default="lora",
        choices=("lora", "dora", "ia3", "prefix", "adapter", "full", "full-bf16"),
    )
    parser.add_argument("--quantize", default="none", help="none, fp8, nf4 or int8")
    parser.add_argument("--products", default="dtype", help="dtype or float8, with nf4")
    parser.add_argument(
        "--checkpointing", default="none", help="none, selective, attention, full, offload or auto"
    )
    parser.add_argument("--tokens", default="4x2048", help="rows at once x tokens a row")
    parser.add_argument("--data", default="full", choices=("full", "alpaca"))
    parser.add_argument("--speed", help="auto or safe; the engine's default without")
    parser.add_argument("--attention", help="engine.attention; its default without")
    parser.add_argument("--dtype", default="auto", help="model.dtype")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", type=Path, help="write the kernels of two more steps there")
    parser.add_argument("--table", action="store_true", help="the whole table")
    parser.add_argument(
        "--page", metavar="DEVICE", help="write a device's table again, and no more"
    )
    parser.add_argument("--rows", help="names of rows of the table, by commas")
    parser.add_argument(
        "--peers",
        default="all",
        choices=("all", "missing", "none"),
        help="which other programs the table measures: those without a result of this device",
    )
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for the whole table")
    parser.add_argument("--limit", type=float, help="GiB that PyTorch may take")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds a configuration")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def record(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add where and when to `result`, append it to gpu_sft.json in `folder`, and return it."""
    whole = result | machine() | {"date": time.strftime("%Y-%m-%d")}
    path = folder / "gpu_sft.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    lines = ",\n".join(json.dumps(line) for line in [*known, whole])
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return whole


def machine() -> dict[str, Any]:
    """Return the device and the versions."""
    import torch

    there = torch.cuda.is_available()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "device_name": torch.cuda.get_device_name() if there else "cpu",
        "versions": versions | {"cudnn": torch.backends.cudnn.version()},
    }


def device_slug(name: str) -> str:
    """Return what the file of a device is called: `NVIDIA H100 80GB HBM3` is h100."""
    found = re.search(r"\b([A-Z]{1,3}\d{2,4}[A-Z]?)\b", name)
    return (found.group(1) if found else name.replace(" ", "-")).lower()


def work() -> None:
    """Measure a job for every line of JSON that comes in, until the lines end."""
    from gpu_job import Job, measure

    for line in sys.stdin:
        try:
            asked = json.loads(line)
            profile = asked.pop("profile", None)
            result = measure(Job(**asked), profile=Path(profile) if profile else None)
        # Whatever goes wrong with one configuration, the others are measured.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            text = str(error).strip().splitlines() or [type(error).__name__]
            result = asked | {"failed": f"{type(error).__name__}: {text[0]}"[:300]}
        print("RESULT " + json.dumps(result), flush=True)


class Worker:
    """A process that measures one job after the other, so that imports are paid once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def measure(self, job: Any, *, timeout: float, profile: Path | None = None) -> dict[str, Any]:
        """Return what was measured, or the reason in `failed`."""
        asked = asdict(job)
        process = self._start()
        line = json.dumps(asked | ({"profile": str(profile)} if profile else {}))
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        end = time.monotonic() + timeout
        while (reply := self._line(process, end)) is not None:
            if reply.startswith(b"RESULT "):
                found: dict[str, Any] = json.loads(reply.removeprefix(b"RESULT "))
                return found
        code = process.poll()
        self.stop()
        why = f"no result after {timeout:.0f} s" if code is None else f"ended with code {code}"
        return asked | {"failed": why}

    def _start(self) -> Any:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, str(HERE / "gpu_sft.py"), "--worker"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
            self._rest = b""
        return self._process

    def _line(self, process: Any, end: float) -> bytes | None:
        """Return the next line, or None where time or output ended before it."""
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                process.wait()
                return None
            self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


if __name__ == "__main__":
    main()
