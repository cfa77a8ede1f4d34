"""Who listens to a run: the record on disk, and the console."""

from __future__ import annotations

import json
import os
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from tunesmith.engine.events import (
    CheckpointingChosen,
    CheckpointSaved,
    Evaluated,
    Event,
    Gathered,
    MicroBatchHalved,
    RunFinished,
    RunStarted,
    StepDone,
    Warned,
    as_json,
)


class JsonlWriter:
    """Writes metrics.jsonl, one event a line, each flushed at once.

    Of what an earlier process wrote, a resumed run keeps the lines up to its checkpoint and a run
    from the start keeps nothing, so that no step is recorded twice. The file is opened at the
    first event, which only the main process hears.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIOWrapper | None = None
        self._earlier: int | None = None
        """Bytes that earlier processes wrote."""

    def __call__(self, event: Event) -> None:
        """Write `event`."""
        file = self._open()
        if isinstance(event, RunStarted):
            self._forget(None if event.resumed_from is None else event.step)
            file = self._open()
        file.write(json.dumps(as_json(event), ensure_ascii=False) + "\n")
        file.flush()
        if isinstance(event, RunFinished):
            self.close()

    def close(self) -> None:
        """Close the file; a later event opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIOWrapper:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if self._earlier is None:
                self._earlier = self.path.stat().st_size
        return self._file

    def _forget(self, after: int | None) -> None:
        """Drop what earlier processes wrote about steps past `after`, or all of it for None."""
        self.close()
        content = self.path.read_bytes()
        earlier, own = content[: self._earlier], content[self._earlier :]
        lines = earlier.splitlines(keepends=True)
        kept = b"".join(line for line in lines if after is not None and _is_until(line, after))
        shorter = self.path.with_suffix(".tmp")
        shorter.write_bytes(kept + own)
        os.replace(shorter, self.path)
        self._earlier = len(kept)


def _is_until(line: bytes, step: int) -> bool:
    """Return whether a line is whole and of an event up to `step`."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except ValueError:
        # The end of a line that a killed process did not get to write.
        return False


class Console:
    """Shows a progress bar in a terminal, and plain lines elsewhere."""

    def __init__(self, terminal: Terminal | None = None) -> None:
        self.terminal = terminal or Terminal(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, event: Event) -> None:
        """Show `event`."""
        if isinstance(event, RunStarted) and self.terminal.is_terminal:
            self._open(event)
        elif isinstance(event, StepDone) and self._bar is not None:
            self._bar.update(self._task, completed=event.step, status=_status(event))
        if (line := _line(event, in_bar=self._bar is not None)) is not None:
            self.terminal.print(line, markup=False, highlight=False)
        if isinstance(event, RunFinished):
            self.close()

    def close(self) -> None:
        """Take the bar away, also where the run failed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open(self, event: RunStarted) -> None:
        self.close()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=self.terminal,
        )
        self._task = self._bar.add_task("", total=event.total, completed=event.step, status="")
        self._bar.start()


def _status(event: StepDone) -> str:
    return (
        f"loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s  "
        f"{event.memory_bytes / 2**30:.1f} GiB  {duration(event.eta_seconds)} left"
    )


def duration(seconds: float) -> str:
    """Return `seconds` as 0:42, 3:07 or 2:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _line(event: Event, *, in_bar: bool) -> str | None:  # noqa: PLR0911 - a line an event
    """Return `event` as a line of text; None where the bar shows it, or nothing does."""
    match event:
        case RunStarted():
            where = f"{event.processes} x {event.device}" if event.processes > 1 else event.device
            return (
                f"training {event.trainable_parameters:,} parameters on {where}, steps "
                f"{event.step + 1} to {event.total} of {event.effective_batch} rows"
            )
        case StepDone(skipped=True):
            return f"step {event.step}/{event.total}  skipped: loss or gradient is not finite"
        case StepDone() if not in_bar:
            return f"step {event.step}/{event.total}  {_status(event)}"
        case Evaluated():
            shown = "  ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
            return f"evaluation at step {event.step}  {shown}{'  (best)' if event.best else ''}"
        case CheckpointSaved():
            return f"saved {event.path} ({event.size_bytes / 2**20:.1f} MiB)"
        case Gathered():
            kl = f"  kl {event.measured['kl']:.2f}" if "kl" in event.measured else ""
            return (
                f"{event.replies} replies for step {event.step}  reward {event.reward:.4f}{kl}  "
                f"length {event.length:.1f}  {event.tokens_per_second:,.0f} tokens/s"
            )
        case Warned() | MicroBatchHalved() | CheckpointingChosen():
            chosen = isinstance(event, CheckpointingChosen)
            return event.message if chosen else f"warning: {event.message}"
        case RunFinished():
            return (
                f"{event.stopped_because.replace('_', ' ')} at step {event.step} after "
                f"{duration(event.seconds)}, {event.tokens_per_second:,.0f} tokens/s"
            )
        case _:
            return None
