"""Running the stages of a chain: each in a process of its own, none twice, each resumed inside."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import TrainingError, TunesmithError
from tunesmith.jobs.data_marks import data_line
from tunesmith.jobs.moved import same_but_moved
from tunesmith.jobs.processes import alone, end_with_parent, started
from tunesmith.jobs.run_directory import RunDirectory, clear, write_text
from tunesmith.report.page import write_report

if TYPE_CHECKING:
    from tunesmith.spec import Run


@dataclass(frozen=True)
class Step:
    """One run of a chain."""

    title: str
    run: Run
    needs: tuple[Path, ...]
    """Files of earlier steps that it builds on; where one changes, it is run again."""

    @property
    def directory(self) -> RunDirectory:
        """Where it lies."""
        return RunDirectory(self.run.directory)

    @property
    def asked(self) -> Path:
        """What was asked for, written before it begins."""
        return self.run.directory.with_name(f"{self.run.name}.asked.yaml")

    def to_text(self) -> str:
        """Return the run file with the marks of what it builds on and what its data holds."""
        marks = [f"# {path.name} {digest(path)}\n" for path in self.needs]
        return "".join([*marks, data_line(self.run.data), self.run.to_yaml()])

    def begun(self) -> bool:
        """Return whether exactly this was begun, here or where the chain lay before."""
        return asked_before(self.asked, self.to_text())

    def finished(self) -> bool:
        """Return whether exactly this lies there whole."""
        return self.directory.summary.is_file() and self.begun()


def asked_before(mark: Path, text: str) -> bool:
    """Return whether the file `mark` says `text`, but for where the chain lay then."""
    return mark.is_file() and same_but_moved(mark.read_text(encoding="utf-8"), text)


def run_step(step: Step, say: Callable[[str], None]) -> None:
    """Train a step unless it is finished; what was begun goes on from its newest checkpoint.

    Raises:
        TrainingError: the run failed or was interrupted; the message says which and how to go on.
    """
    if step.finished():
        if not step.directory.report.is_file():  # killed between the two
            write_report(step.directory.path)
        say(f"{step.title}: finished before")
        return
    begun = step.begun()
    say(f"{step.title}: {'going on' if begun else 'starting'} in {step.run.directory}")
    if not begun:
        clear(step.directory)
        step.asked.parent.mkdir(parents=True, exist_ok=True)
        write_text(step.asked, step.to_text())
    code = in_a_process(_train, step.run)
    if code != 0 or not step.finished():
        how = f"signal {-code}" if code < 0 else f"exit {code}"
        why = "was interrupted" if code == 0 else f"failed ({how}; its message is above)"
        raise TrainingError(
            f"stage {step.title} {why}; the same command goes on from its newest checkpoint"
        )


def in_a_process(work: Callable[..., None], *arguments: Any) -> int:
    """Run `work` in a fresh process, which ends with this one, and return its exit code.

    A process, so that the memory of one stage, on the device too, is free for the next.
    """
    process = started(_body, work, arguments)
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()  # it was told too, and saves a checkpoint before it ends
        raise
    return int(process.exitcode or 0)


def _body(work: Callable[..., None], arguments: Sequence[Any]) -> None:
    end_with_parent()
    try:
        work(*arguments)
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the process's last word
        sys.exit(error.exit_code)


def _train(run: Run) -> None:
    from tunesmith.jobs.train import train

    with alone(run.directory):
        train(run, resume=True)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or that it is missing."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
