"""The runs of a comparison, each in a process of its own, and never a finished one twice."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Final

import yaml
from pydantic import ValidationError

from tunesmith.errors import SpecError, TunesmithError
from tunesmith.jobs.data_marks import data_line, same_data
from tunesmith.jobs.features_spec import FeatureRun, FeatureSettings
from tunesmith.jobs.moved import same_but_moved
from tunesmith.jobs.processes import end_with_parent, started
from tunesmith.jobs.prompting_spec import PromptingRun, PromptingSettings
from tunesmith.jobs.run_directory import RunDirectory, write_text
from tunesmith.spec import validate

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from tunesmith.spec import Run

SAME_STEP: Final = ("speed", "checkpointing", "padding", "attention")
"""Settings of the engine that say how a step is computed; what it computes is the same but for
rounding."""


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    row: str
    """The row it belongs to."""
    run: Run
    keep: bool
    """Whether what it trained is kept; a trial of a learning rate leaves its numbers only."""
    features: FeatureSettings | None = None
    """Of a row that trains nothing: how it classifies instead."""
    prompting: PromptingSettings | None = None
    """Of a row that trains nothing: how it asks the model instead."""

    @property
    def directory(self) -> RunDirectory:
        """Where it lies."""
        return RunDirectory(self.run.directory)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.run.directory.with_name(f"{self.run.name}.log")

    @property
    def failure(self) -> Path:
        """Why it failed, where it did."""
        return self.run.directory.with_name(f"{self.run.name}.failed.txt")

    @property
    def asked(self) -> Path:
        """What was asked for, written when it is done; run.yaml also says what the data told."""
        return self.run.directory.with_name(f"{self.run.name}.asked.yaml")

    def to_yaml(self) -> str:
        """Return the file that says exactly what is asked for."""
        if self.features is not None:
            return FeatureRun(self.run, self.features).to_yaml()
        if self.prompting is not None:
            return PromptingRun(self.run, self.prompting).to_yaml()
        return self.run.to_yaml()

    def finished(self) -> bool:
        """Return whether this run lies there whole.

        It does where what was asked for then is what is asked for now, of files that hold what they
        held. Settings that came later had their defaults then, and `auto` in one of `SAME_STEP` is
        content with any choice.
        """
        if not (self.directory.summary.is_file() and self.asked.is_file()):
            return False
        text = self.asked.read_text(encoding="utf-8")
        then = self._as_asked(text)
        return (
            then is not None
            and same_data(text, data_line(self.run.data))
            and same_but_moved(then.to_yaml(), _with_choices_of(then, self).to_yaml())
        )

    def _as_asked(self, text: str) -> Trial | None:
        """Return the trial that `text` asked for; None where it is not understood any more."""
        try:
            values = yaml.safe_load(text)
            features, prompting = values.pop("features", None), values.pop("prompting", None)
            return Trial(
                self.row,
                validate(values, source=str(self.asked), lines={}),
                self.keep,
                None if features is None else FeatureSettings.model_validate(features),
                None if prompting is None else PromptingSettings.model_validate(prompting),
            )
        except (yaml.YAMLError, AttributeError, SpecError, ValidationError):
            return None

    def why_failed(self) -> str | None:
        """Return what the run said when it failed, or None."""
        return self.failure.read_text(encoding="utf-8").strip() if self.failure.exists() else None

    def summary(self) -> dict[str, Any]:
        """Return the evidence of the finished run."""
        found: dict[str, Any] = self.directory.read_json(self.directory.summary)
        return found


def _with_choices_of(finished: Trial, asked: Trial) -> Trial:
    """Return `asked` with what `finished` chose wherever it asks for `auto` in `SAME_STEP`."""
    engine = asked.run.engine.model_dump(include=set(SAME_STEP))
    chosen = finished.run.engine.model_dump(include={k for k, v in engine.items() if v == "auto"})
    run = asked.run.model_copy(update={"engine": asked.run.engine.model_copy(update=chosen)})
    return replace(asked, run=run)


def run_trials(
    trials: Iterable[Trial], *, at_once: int, done: Callable[[Trial], None]
) -> list[Trial]:
    """Run what is not finished yet and return the trials that are, in their order.

    A trial that fails leaves its reason in `failure` and is left out; the others go on.

    Args:
        trials: what to run.
        at_once: processes at the same time.
        done: told of each trial as it ends, or is found finished.
    """
    trials = list(trials)
    waiting = [trial for trial in trials if not trial.finished()]
    for trial in trials:
        if trial not in waiting:
            done(trial)
    running: dict[int, tuple[BaseProcess, Trial]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                process = _start(waiting[0])
                running[process.sentinel] = (process, waiting.pop(0))
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)  # noqa: S101
                process, trial = running.pop(sentinel)
                process.join()
                _note_death(process, trial)
                done(trial)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()
    return [trial for trial in trials if trial.finished()]


def _start(trial: Trial) -> BaseProcess:
    trial.failure.unlink(missing_ok=True)
    trial.asked.unlink(missing_ok=True)
    trial.log.parent.mkdir(parents=True, exist_ok=True)
    return started(_train, trial)


def _note_death(process: BaseProcess, trial: Trial) -> None:
    """Say of a process that died without a word how it ended."""
    if process.exitcode and not trial.failure.exists():
        how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit {process.exitcode}"
        more = " (probably out of memory)" if process.exitcode == -9 else ""
        write_text(trial.failure, f"the process ended by {how}{more}; see {trial.log.name}\n")


def _train(trial: Trial) -> None:
    """Train one run; the body of its process."""
    end_with_parent()
    with trial.log.open("w", encoding="utf-8") as file, _printing_to(file.fileno()):
        try:
            data = data_line(trial.run.data)
            _work(trial)
            _clean(trial.directory, keep=trial.keep)
            write_text(trial.asked, data + trial.to_yaml())
        except TunesmithError as error:
            write_text(trial.failure, f"{error}\n")
            sys.exit(error.exit_code)
        # Whatever a row dies of is the row's result, and the other rows still want to run.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            write_text(trial.failure, f"{type(error).__name__}: {error}\n")
            sys.exit(1)


def _work(trial: Trial) -> None:
    """Train, or do instead what the row says; what it needs is imported in its own process only."""
    if trial.features is not None:
        from tunesmith.jobs.features import learn_from_features

        learn_from_features(FeatureRun(trial.run, trial.features), print, overwrite=True)
        return
    if trial.prompting is not None:
        from tunesmith.jobs.prompting import ask

        ask(PromptingRun(trial.run, trial.prompting), print, overwrite=True)
        return
    from tunesmith.jobs.train import train

    train(trial.run, overwrite=True)


def _clean(directory: RunDirectory, *, keep: bool) -> None:
    """Remove what nobody will read again."""
    shutil.rmtree(directory.path / "checkpoints", ignore_errors=True)
    if not keep:
        shutil.rmtree(directory.adapter, ignore_errors=True)
        shutil.rmtree(directory.model, ignore_errors=True)


@contextlib.contextmanager
def _printing_to(descriptor: int) -> Iterator[None]:
    """Send everything this process prints to an open file."""
    sys.stdout.flush()
    sys.stderr.flush()
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    yield
