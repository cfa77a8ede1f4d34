"""The directory of a run: what may be written where, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tunesmith.errors import CheckpointError, SpecError
from tunesmith.jobs.moved import differences, where_it_is
from tunesmith.json_text import parse_json, strict_json
from tunesmith.spec import Run, load_run_file
from tunesmith.yaml_text import dotted

MAY_DIFFER = {"tracking", "checkpoint"}
"""Parts of a spec that decide nothing about the weights, so a resumed run may change them."""


@dataclass(frozen=True)
class RunDirectory:
    """Where everything of one run lies."""

    path: Path

    @property
    def spec(self) -> Path:
        """The fully resolved run file."""
        return self.path / "run.yaml"

    @property
    def adapter(self) -> Path:
        """What was trained."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The whole tuned model, where everything trained."""
        return self.path / "model"

    @property
    def classifier(self) -> Path:
        """What learned from features, where the model itself was left as it was."""
        return self.path / "classifier.safetensors"

    @property
    def summary(self) -> Path:
        """The evidence."""
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        """One event a line."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Replies before and after."""
        return self.path / "samples.json"

    @property
    def outcomes(self) -> Path:
        """Scores of each evaluation row after training, for intervals and paired comparisons."""
        return self.path / "outcomes.json"

    @property
    def evaluation(self) -> Path:
        """Metrics of the last `tunesmith eval`."""
        return self.path / "evaluation.json"

    @property
    def environment(self) -> Path:
        """Versions, hardware, seed, code revision."""
        return self.path / "environment.json"

    @property
    def report(self) -> Path:
        """One self-contained page."""
        return self.path / "report.html"

    def begin(self, run: Run) -> None:
        """Make the directory and write run.yaml."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"output: cannot make {self.path}: {error.strerror}") from error
        write_text(self.spec, run.to_yaml())

    def read_json(self, path: Path) -> Any:
        """Return what a JSON file of this run holds; None is a number that was not finite."""
        try:
            return parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not there; did the run finish?") from None


def run_of_adapter(directory: Path) -> RunDirectory:
    """Return the run whose adapter lies in `directory`; one without a run file where it is none."""
    directory = directory.absolute()
    run = RunDirectory(directory.parent)
    return run if run.adapter == directory else RunDirectory(directory)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that the file is the old one or the new one, never a part.

    Raises:
        CheckpointError: the disk is full or not writable; the old file is intact.
    """
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            partial = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, whole or not at all; what is not finite as null."""
    write_text(path, strict_json(content, indent=2) + "\n")


def check_free(run: Run, *, resume: bool, overwrite: bool) -> RunDirectory:
    """Return the run's directory if this run may use it. Nothing is written or removed.

    Raises:
        CheckpointError: it exists and neither resume nor overwrite was asked for, or it is not a
            run directory.
        SpecError: resuming with settings other than the run's own.
    """
    directory = RunDirectory(run.directory)
    # What a process left that was killed while it wrote its first file begins with a dot.
    if not any(not path.name.startswith(".") for path in _entries(directory.path)):
        return directory
    if not directory.spec.is_file():
        raise CheckpointError(
            f"output: {directory.path} exists and is no run directory; choose another name"
        )
    if resume:
        _check_same(run, directory)
    elif not overwrite:
        raise CheckpointError(
            f"output: {directory.path} exists; --resume goes on with it, --overwrite starts again"
        )
    return directory


def clear(directory: RunDirectory) -> None:
    """Remove what an earlier run left in a run directory, which is never seen in part."""
    leaving = directory.path.with_name(f".{directory.path.name}.leaving")
    shutil.rmtree(leaving, ignore_errors=True)  # of a process that was killed while it did this
    if directory.spec.is_file():
        os.replace(directory.path, leaving)
        shutil.rmtree(leaving)


_TRAINS_NOTHING: Final = {
    "features": "`tunesmith predict` uses it, and report.html says how good it is",
    "prompting": "report.html says how good it is",
}
"""Sections of a run file whose run leaves no model of its own, and where to look instead."""


def open_finished(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunDirectory, Run]:
    """Return an existing run directory and its spec, with overrides applied.

    Paths in the spec to what moved along with the directory are those of today.

    Raises:
        CheckpointError: there is no run.
        SpecError: the run trained nothing.
    """
    directory = RunDirectory(Path(path))
    if not directory.spec.is_file():
        raise CheckpointError(f"{path}: no run directory (it has no run.yaml)")
    sections = yaml.safe_load(directory.spec.read_text(encoding="utf-8"))
    for section, instead in _TRAINS_NOTHING.items():
        if section in sections:
            raise SpecError(
                f"{path}: is a run of {section}, which trains no model to load; {instead}"
            )
    run = load_run_file(directory.spec, overrides)
    return directory, where_it_is(run, directory.path)


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.exists() else []


def _check_same(run: Run, directory: RunDirectory) -> None:
    before = yaml.safe_load(directory.spec.read_text(encoding="utf-8"))
    now = yaml.safe_load(run.to_yaml())
    if now["objective"].get("labels") is None and "labels" in before["objective"]:
        before["objective"]["labels"] = None  # found in the data, as they will be again
    found = differences(before, now)
    differing = [dotted(place) for place in found if place[0] not in MAY_DIFFER]
    if differing:
        raise SpecError(
            f"{directory.path}: cannot resume with other settings than the run's own; "
            f"{', '.join(differing)} differ; give them back or start under another name"
        )
