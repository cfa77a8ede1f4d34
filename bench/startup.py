"""How long `tunesmith --help` and `import tunesmith` take: `python bench/startup.py`.

Writes bench/results/startup.json: seconds of whole processes, the fastest and the median of 10.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tunesmith.jobs.environment import hardware, package_versions

RESULT = Path(__file__).parent / "results" / "startup.json"
COMMANDS = {
    "tunesmith --help": [sys.executable, "-m", "tunesmith", "--help"],
    "import tunesmith": [sys.executable, "-c", "import tunesmith"],
    "python alone": [sys.executable, "-c", ""],
}


def main() -> None:
    result = {
        "seconds": {name: measured(command) for name, command in COMMANDS.items()},
        "hardware": hardware(),
        "versions": package_versions(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["seconds"], indent=1))


def measured(command: list[str]) -> dict[str, float]:
    """Return the fastest and the median of ten runs, in seconds."""
    times = []
    for _ in range(10):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return {"fastest": round(min(times), 3), "median": round(statistics.median(times), 3)}


if __name__ == "__main__":
    main()
