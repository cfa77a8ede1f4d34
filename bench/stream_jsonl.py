"""Stream a JSONL file of a million rows through the data room and watch the memory.

Run `python bench/stream_jsonl.py [--rows 1000000]`; it writes bench/results/stream_jsonl.json.
Every row is read, converted, tokenised, shuffled and packed, as in training with data.streaming.
The tokenizer knows whole words and keeps no cache; a byte-pair tokenizer's own cache of words adds
a few MiB in the first rows. PyTorch is not loaded on this path. Wall time depends on what else the
machine does (see load_average), CPU time hardly.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.settings import DataSettings, Source
from tunesmith.data.streaming import StreamingRows

RESULT = Path(__file__).parent / "results" / "stream_jsonl.json"
SAMPLES = 20
"""How often memory is looked at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write(path, rows)
        result = stream(path, rows)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result | about(), indent=1) + "\n", encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


def write(path: Path, rows: int) -> None:
    """Write rows of 40 to 400 characters, each different."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            text = f"Row {number} tells a story of its own. " * (1 + number * 7919 % 10)
            file.write(json.dumps({"text": text, "id": number}) + "\n")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, which costs least, so that reading shows."""
    words = ["<eos>", "<unk>", "Row", "tells", "a", "story", "of", "its", "own", "."]
    core = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


def stream(path: Path, rows: int) -> dict[str, object]:
    """Take packed rows until every row of the file has come; return speed and memory."""
    settings = DataSettings(
        train=[Source(path=str(path))], streaming=True, packing=True, max_length=2048
    )
    stream = StreamingRows(settings, word_tokenizer(), seed=0)
    process = psutil.Process()
    memory: list[dict[str, float]] = []
    samples = tokens = packed = 0
    before, load = peak_mib(), os.getloadavg()
    began, began_cpu = time.perf_counter(), time.process_time()
    while samples < rows:
        row = stream.take(1)[0]
        samples += len(row.segments)
        tokens += len(row.input_ids)
        packed += 1
        if samples >= rows * (len(memory) + 1) / SAMPLES:
            memory.append({"rows": samples, "MiB": round(process.memory_info().rss / 2**20, 1)})
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    later = [entry["MiB"] for entry in memory]
    return {
        "rows": rows,
        "file_MiB": round(path.stat().st_size / 2**20, 1),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "load_average": [round(value, 1) for value in load],
        "rows_per_second": round(rows / seconds),
        "rows_per_cpu_second": round(rows / cpu),
        "tokens": tokens,
        "MiB_if_all_tokens_were_kept": round(tokens * 5 / 2**20, 1),
        "packed_rows": packed,
        "filled": round(tokens / (packed * settings.max_length), 4),
        "state_KiB": round(len(json.dumps(stream.state_dict())) / 2**10, 1),
        "memory": memory,
        "peak_MiB_before": before,
        "peak_MiB": peak_mib(),
        "growth_MiB_from_5_to_100_percent": round(later[-1] - later[0], 1),
    }


def peak_mib() -> float:
    """Return the most memory that this process ever had resident, as the system counted it."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def about() -> dict[str, object]:
    """Return the machine, the date and the versions."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("tunesmith", "torch", "transformers", "tokenizers", "numpy")
    return {
        "machine": {
            "cpu": names[0] if names else platform.processor(),
            "cores": psutil.cpu_count(),
            "memory_GiB": round(psutil.virtual_memory().total / 2**30),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
    }


if __name__ == "__main__":
    main()
