"""What a run directory tells, read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError, DataError
from tunesmith.json_text import parse_json


@dataclass(frozen=True)
class Record:
    """The files of a run, as far as they are there."""

    name: str
    run_file: str | None
    """The text of run.yaml."""
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl, one event a line (see tunesmith.engine.events)."""

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of these kinds, in their order."""
        return [event for event in self.events if event.get("event") in kinds]

    def course(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of a field of the optimiser steps, where it is a number."""
        return _numbers((event.get("step"), event.get(key)) for event in self.of_kind("step_done"))

    def gathered(self, key: str) -> list[tuple[int, float]]:
        """Return (first step that learns from them, value) of what was told of each roll-out."""
        events = self.of_kind("gathered")
        values = [event | event.get("measured", {}) for event in events]
        return _numbers((value.get("step"), value.get(key)) for value in values)

    def evaluations(self) -> dict[str, list[tuple[int, float]]]:
        """Return (step, value) of every evaluation metric, where it is a number."""
        events = self.of_kind("evaluated")
        names = dict.fromkeys(name for event in events for name in event.get("metrics", {}))
        return {
            name: _numbers((event.get("step"), event["metrics"].get(name)) for event in events)
            for name in names
        }


def read_record(run_dir: Path) -> Record:
    """Return what is in a run directory; parts that are missing are empty.

    Raises:
        CheckpointError: there is no such directory.
        DataError: a file is damaged.
    """
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: there is no such run directory to report on")
    summary = _read_json(run_dir / "summary.json", dict)
    run_file = run_dir / "run.yaml"
    return Record(
        name=str(summary.get("name") or run_dir.resolve().name),
        run_file=run_file.read_text(encoding="utf-8") if run_file.is_file() else None,
        summary=summary,
        environment=_read_json(run_dir / "environment.json", dict),
        samples=_read_json(run_dir / "samples.json", list),
        events=_read_events(run_dir / "metrics.jsonl"),
    )


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); remove it to report without it") from error
    if not isinstance(content, kind):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


def _read_events(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = parse_json(line)
        except ValueError:
            # A killed process leaves half a line; what was recorded before it still counts.
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _numbers(points: Any) -> list[tuple[int, float]]:
    """Keep the points whose value is a number; null stands for one that was not finite."""
    return [
        (int(step), float(value))
        for step, value in points
        if isinstance(step, int) and isinstance(value, int | float) and not isinstance(value, bool)
    ]
