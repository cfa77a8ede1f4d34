"""The demonstrations of alignment: runs each by its one command and writes what came out.

    python bench/alignment.py [--only reward dpo ppo grpo rlhf] [SETTING=VALUE ...]

Settings (engine.device=cpu, train.max_steps=4) go to every run, for a look at it. A run that is
finished is not run again, so a table can be made of runs that were made elsewhere. Writes
bench/results/alignment.md out of the summaries of runs/ and nothing else.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "alignment.md"


class Demonstration(NamedTuple):
    """One run: its file, and settings over it."""

    file: str
    settings: tuple[str, ...] = ()
    command: str = "train"

    @property
    def name(self) -> str:
        """Name of the run directory."""
        named = [s.removeprefix("name=") for s in self.settings if s.startswith("name=")]
        return named[0] if named else self.file

    def arguments(self) -> list[str]:
        """Return what follows `tunesmith`."""
        return [self.command, f"examples/{self.file}.yaml", *self.settings]


def losses_of_dpo() -> tuple[Demonstration, ...]:
    others = [
        Demonstration("dpo-polite", (f"objective.loss={loss}", f"name={loss}-polite"))
        for loss in ("ipo", "orpo")
    ]
    named = [Demonstration(f"{loss}-polite") for loss in ("dpo", "kto", "simpo")]
    return (*named, *others)


def seeds_of_ppo() -> tuple[Demonstration, ...]:
    return tuple(
        Demonstration("ppo-sentiment", (f"seed={seed}", f"name=ppo-sentiment-{seed}"))
        for seed in range(3)
    )


DEMONSTRATIONS: dict[str, tuple[Demonstration, ...]] = {
    "reward": (Demonstration("reward-harmless"), Demonstration("reward-ultrafeedback")),
    "dpo": losses_of_dpo(),
    "ppo": (Demonstration("movie-classifier"), *seeds_of_ppo()),
    "grpo": (Demonstration("grpo-arithmetic"),),
    "rlhf": (Demonstration("rlhf-politeness", command="align"),),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=DEMONSTRATIONS, default=list(DEMONSTRATIONS))
    arguments, settings = parser.parse_known_args()
    for title in arguments.only:
        for demonstration in DEMONSTRATIONS[title]:
            run(demonstration, settings)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(written())
    print(f"wrote {RESULTS}")


def run(demonstration: Demonstration, settings: list[str]) -> None:
    if demonstration.command == "train" and summary_of(demonstration.name) is not None:
        return
    own = settings
    if demonstration.command == "align":
        own = [f"common.{setting}" for setting in settings]
    resume = ["--resume"] if demonstration.command == "train" else []
    command = [sys.executable, "-m", "tunesmith", *demonstration.arguments(), *own, *resume]
    subprocess.run(command, cwd=ROOT, check=True)


def summary_of(name: str) -> dict[str, Any] | None:
    path = ROOT / "runs" / name / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None


def written() -> str:
    """Return the page, of those demonstrations that have finished."""
    parts = ["# Alignment, measured\n\nWritten by bench/alignment.py from the runs' summaries.\n"]
    for title, demonstrations in DEMONSTRATIONS.items():
        tables = [part for one in demonstrations if (part := table_of(one))]
        if tables:
            parts += [f"## {title}\n", *tables]
    return "\n".join(parts)


def table_of(demonstration: Demonstration) -> str:
    if demonstration.command == "align":
        return chain_of(demonstration)
    summary = summary_of(demonstration.name)
    if summary is None:
        return ""
    before, after = summary["before"], summary["after"]
    rows = [f"| {n} | {number(before.get(n))} | {number(v)} |" for n, v in after.items()]
    hardware = summary["hardware"]
    device = next(iter(hardware["cuda_devices"]), hardware["processor"])
    return "\n".join(
        [
            f"`tunesmith {' '.join(demonstration.arguments())}`: {summary['steps']} steps in "
            f"{summary['seconds']:.0f} s ({device}).\n",
            "| metric | before | after |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def chain_of(demonstration: Demonstration) -> str:
    path = ROOT / "runs" / demonstration.name / "alignment.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text())
    names = ("reward", "low", "high", "kl", "length", "ended", "distinct_2", "self_bleu")
    rows = [
        f"| {v['name']} | {' | '.join(number(v[name]) for name in names)} | "
        f"{', '.join(f'{share:.0%} against {other}' for other, share in v['won'].items())} |"
        for v in found["verdicts"]
    ]
    return "\n".join(
        [
            f"`tunesmith {' '.join(demonstration.arguments())}`, judged on {found['prompts']} "
            "held-out prompts.\n",
            f"| policy | {' | '.join(names)} | wins |",
            "|---" * (len(names) + 2) + "|",
            *rows,
            "",
        ]
    )


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


if __name__ == "__main__":
    main()
