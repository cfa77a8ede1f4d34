"""Run a run file and keep its evidence: `python bench/evidence.py examples/e2e-lora.yaml`.

Writes bench/results/<name>.json: summary.json of the run (metrics before and after, time, memory,
proofs), its sample replies, wall time of the whole job, versions and hardware.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from tunesmith.jobs.environment import environment
from tunesmith.jobs.train import train
from tunesmith.spec import load_run_file

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = load_run_file(arguments.run_file, [*arguments.overrides, f"output={folder}"])
        started = time.perf_counter()
        result = train(run)
        seconds = time.perf_counter() - started
        evidence = {
            "run_file": arguments.run_file,
            "overrides": arguments.overrides,
            "wall_seconds": round(seconds, 1),
            "versions": environment(run.seed)["versions"],
            "started": environment(run.seed)["started"],
            "summary": result.summary,
            "samples": result.directory.read_json(result.directory.samples),
        }
    path = RESULTS / f"{run.name}.json"
    text = json.dumps(evidence, indent=1, ensure_ascii=False) + "\n"
    path.write_text(relative(text, folder), encoding="utf-8")
    print(f"wrote {path}")


def relative(text: str, folder: str) -> str:
    """Return `text` without the paths of this machine."""
    here = Path.cwd()
    for absolute, short in ((folder, "runs"), (str(here), "."), (str(here.parent), "..")):
        text = text.replace(absolute, short)
    return text


if __name__ == "__main__":
    main()
