"""Where the time of a training step goes on a GPU, by the kind of its kernels.

    python bench/gpu_sft.py --shape 1b --method full-bf16 --dtype bfloat16 \
        --profile bench/results/profiles/h200-full-1b.txt
    python bench/time_shares.py "NVIDIA H200"

Reads the tables that gpu_sft.py wrote with --profile, named <device>-<row>.txt, and writes
bench/results/time-<device>.md. A table holds the 40 entries that took longest; what lies below them
is the rest.
"""

import argparse
import re
from pathlib import Path

from gpu_job import PROFILED
from gpu_sft import RESULTS, device_slug
from gpu_table import ROWS

PROFILES = RESULTS / "profiles"
KINDS = {
    "matrix products": r"aten::(mm|addmm|_scaled_mm)$",
    "attention": r"aten::_(cudnn|flash|efficient)_attention_|aten::_scaled_dot_product",
    "softmax and gradient of the loss": r"triton_.*(argmax|_eq_)",
    "pointwise work, norms, casts": r"triton_|aten::(mul|add|copy_|sum|cat)$",
    "optimiser and clipping": r"aten::(_fused_adamw_|_foreach_)",
}
"""What an operator's name begins with; the first that fits counts."""
PROFILED_WITH = {"long": "fp8, every block computed again as a whole"}
"""How a row was profiled that can be done in several ways."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", help="its name, as torch gives it")
    device = parser.parse_args().device
    slug = device_slug(device)
    tables = sorted(PROFILES.glob(f"{slug}-*.txt"))
    if not tables:
        parser.error(f"there is no {PROFILES}/{slug}-*.txt")
    path = RESULTS / f"time-{slug}.md"
    path.write_text(page(device, tables), encoding="utf-8")
    print(path)


def page(device: str, tables: list[Path]) -> str:
    """Return the page in Markdown."""
    found = {path.stem.partition("-")[2]: shares(path.read_text("utf-8")) for path in tables}
    names = [*KINDS, "the rest"]
    lines = [
        f"# Where a step's time goes on one {device}",
        "",
        "Written by `python bench/time_shares.py` from the profiles of two steps in",
        "bench/results/profiles; milliseconds of kernels a step, and their share.",
        "",
        f"| job | {' | '.join(names)} | all |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for row, times in found.items():
        total = sum(times.values())
        cells = [f"{times[name]:.1f} ({times[name] / total:.0%})" for name in names]
        how = f" ({PROFILED_WITH[row]})" if row in PROFILED_WITH else ""
        lines.append(f"| {ROWS[row].about}{how} | {' | '.join(cells)} | {total:.1f} |")
    return "\n".join([*lines, ""])


def shares(table: str) -> dict[str, float]:
    """Return the milliseconds of a step by kind, from a table of torch's profiler."""
    times = dict.fromkeys(KINDS, 0.0)
    for line in table.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        # Operators stand in the table beside the kernels they start, which took no processor time.
        if len(cells) != 11 or not re.match(r"(aten::|triton_)", cells[0]) or cells[2] == "0.000us":
            continue
        kind = next((k for k, names in KINDS.items() if re.match(names, cells[0])), None)
        if kind is not None:
            times[kind] += milliseconds(cells[6])
    total = re.search(r"Self CUDA time total: (\S+)", table)
    if total is None:
        raise SystemExit("the table has no line 'Self CUDA time total'")
    times["the rest"] = milliseconds(total[1]) - sum(times.values())
    return {name: time / PROFILED for name, time in times.items()}


def milliseconds(text: str) -> float:
    """Return a time as the profiler writes it."""
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


if __name__ == "__main__":
    main()
