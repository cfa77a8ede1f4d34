"""The demonstrations of alignment: runs each by its one command and writes what came out.

    python bench/alignment.py [--only reward dpo ppo grpo rlhf distillation] [SETTING=VALUE ...]
    python bench/alignment.py --collect DIRECTORY ...

A setting goes to every run. A demonstration that is finished is not run again. With --collect
nothing is run: the run directories are taken from where they are, made on another machine perhaps.
Runs that did not come to their end count as far as they came. `grpo-arithmetic-1e-4` beside
`grpo-arithmetic` is the same demonstration with other settings. What was found before stays, but
for what is now there and came as far: had its policies judged, or was evaluated as late. Either way
bench/results/alignment.json is written out of what the runs left, and out of that file alone
bench/results/alignment.md, the pictures, and the tables in docs/.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignment_facts import changed, facts_of
from alignment_pictures import pictures
from alignment_tables import page, tables
from readme import filled

ROOT = Path(__file__).resolve().parents[1]
FOUND = ROOT / "bench" / "results" / "alignment.json"
PAGE = FOUND.with_suffix(".md")
EXAMPLES = ROOT / "examples"
FILLED = ("alignment.md", "rlhf-case-study.md")
"""Pages of docs/ with tables in them."""


class Demonstration(NamedTuple):
    """One command; its file has the name of its directory."""

    title: str
    file: str
    command: str

    def arguments(self) -> list[str]:
        """Return what follows `tunesmith`."""
        return [self.command, f"examples/{self.file}.yaml"]


DEMONSTRATIONS = (
    Demonstration("reward", "reward-harmless", "train"),
    Demonstration("reward", "reward-ultrafeedback", "train"),
    Demonstration("dpo", "polite-preferences", "align"),
    Demonstration("dpo", "polite-preferences-more", "align"),
    Demonstration("ppo", "ppo-sentiment", "align"),
    Demonstration("ppo", "ppo-sentiment-cpu", "align"),
    Demonstration("grpo", "grpo-arithmetic", "train"),
    Demonstration("rlhf", "rlhf-politeness", "align"),
    Demonstration("distillation", "distillation", "align"),
)


def main() -> None:
    titles = list(dict.fromkeys(one.title for one in DEMONSTRATIONS))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=titles, default=titles)
    parser.add_argument("--collect", nargs="+", type=Path, help="folders with run directories")
    arguments, settings = parser.parse_known_args()
    chosen = [one for one in DEMONSTRATIONS if one.title in arguments.only]
    if not arguments.collect:
        for demonstration in chosen:
            run(demonstration, settings)
    found = json.loads(FOUND.read_text("utf-8")) if FOUND.is_file() else {}
    for demonstration in chosen:
        found |= collected(demonstration, arguments.collect or [ROOT / "runs"], found)
    FOUND.parent.mkdir(exist_ok=True)
    FOUND.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write(found)


def collected(
    demonstration: Demonstration, folders: Sequence[Path], before: dict[str, Any]
) -> dict[str, Any]:
    """Return by their directories' names what came further than what was found of them before."""
    file, found = demonstration.file, {}
    command = f"tunesmith {' '.join(demonstration.arguments())}"
    for folder in folders:
        for place in (folder / file, *sorted(folder.glob(f"{file}-*"))):
            if place.name != file and place.name in {one.file for one in DEMONSTRATIONS}:
                continue
            known = found.get(place.name, before.get(place.name, {}))
            facts = facts_of(place)
            if facts and progress(facts) >= progress(known):
                found[place.name] = {"file": file, "command": command} | facts
                found[place.name]["changed"] = changed(place, EXAMPLES / f"{file}.yaml")
                found[place.name]["replaced"] = replaced(known, facts)
    return found


def replaced(known: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return when the runs were that `facts` take the place of: others ran beside them."""
    now = times_of(facts)
    return known.get("replaced", []) + [one for one in times_of(known) if one not in now]


def times_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return device and times of a run, or of each run of a chain."""
    runs = facts.get("stages", {"": facts} if facts else {}).values()
    return [{"device": run["device"], "ran": run["ran"]} for run in runs]


def progress(facts: dict[str, Any]) -> tuple[int, int, int]:
    """Return what tells how far a run or a chain came: policies judged, steps, stages at an end.

    Steps go first of these two: a look at a demonstration is at its end after a few.
    """
    if not facts:
        return (0, 0, 0)
    runs = list(facts.get("stages", {"": facts}).values())
    ended = sum("stopped" not in run for run in runs)
    return (len(facts.get("verdicts", [])), sum(run["steps"] for run in runs), ended)


def run(demonstration: Demonstration, settings: Sequence[str]) -> None:
    """Run a demonstration, or what is left of it."""
    own, resume = list(settings), []
    if demonstration.command == "align":
        own = [f"common.{setting}" for setting in settings]
    elif (ROOT / "runs" / demonstration.file / "summary.json").is_file():
        return
    else:
        resume = ["--resume"]
    command = [sys.executable, "-m", "tunesmith", *demonstration.arguments(), *own, *resume]
    subprocess.run(command, cwd=ROOT, check=True)


def write(found: dict[str, Any]) -> None:
    """Write the pages of what was found."""
    PAGE.write_text(page(found), encoding="utf-8")
    written = [PAGE]
    for name, drawing in pictures(found).items():
        written.append(ROOT / "docs" / name)
        written[-1].write_text(drawing, encoding="utf-8")
    for name in FILLED:
        path = ROOT / "docs" / name
        text = path.read_text(encoding="utf-8")
        for slot, content in tables(found).items():
            if f"<!-- {slot} -->" in text:
                text = filled(text, slot, content)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    print("wrote", *(str(path.relative_to(ROOT)) for path in written))


if __name__ == "__main__":
    main()
