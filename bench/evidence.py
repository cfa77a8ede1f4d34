"""Keep the evidence of a run: `python bench/evidence.py examples/e2e-lora.yaml`, or `runs/demo`.

A run file is run first, in a temporary folder; a run directory is taken as it is. Writes
bench/results/<name>.json: the run's summary (metrics before and after, time, memory, proofs), its
sample replies, versions and hardware.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tunesmith.jobs.run_directory import RunDirectory
from tunesmith.jobs.train import train
from tunesmith.spec import load_run_file

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run file, or the directory of a finished run")
    parser.add_argument("overrides", nargs="*", help="settings over those of the run file")
    arguments = parser.parse_args()
    if Path(arguments.run).is_dir():
        record(RunDirectory(Path(arguments.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run = load_run_file(arguments.run, [*arguments.overrides, f"output={folder}"])
        record(train(run).directory)


def record(directory: RunDirectory) -> None:
    """Write what a finished run came to into bench/results."""
    summary, environment, samples = (
        directory.read_json(path)
        for path in (directory.summary, directory.environment, directory.samples)
    )
    evidence = {
        "started": environment["started"],
        "versions": environment["versions"],
        "summary": summary,
        "samples": samples,
    }
    path = RESULTS / f"{summary['name']}.json"
    text = json.dumps(evidence, indent=1, ensure_ascii=False) + "\n"
    path.write_text(relative(text, directory.path.parent.absolute()), encoding="utf-8")
    print(f"wrote {path}")


def relative(text: str, output: Path) -> str:
    """Return `text` without the paths of this machine."""
    here = Path.cwd()
    for absolute, short in ((output, "runs"), (here, "."), (here.parent, "..")):
        text = text.replace(str(absolute), short)
    return text


if __name__ == "__main__":
    main()
