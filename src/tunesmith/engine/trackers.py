"""Experiment trackers, through accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from tunesmith.engine.events import Evaluated, Event, RunFinished, RunStarted, StepDone
from tunesmith.errors import SetupError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from tunesmith.engine.settings import TrackingSettings
    from tunesmith.types import JSON


class Trackers:
    """Sends steps and evaluations to the trackers of `tracking.trackers`."""

    def __init__(
        self, settings: TrackingSettings, run_dir: Path, config: Mapping[str, JSON]
    ) -> None:
        """Check that the trackers are there; they start with the run.

        Args:
            settings: which trackers, and the project.
            run_dir: where trackers that write files write them; its name is the run's.
            config: the run's settings, nested as in its file, to be shown beside its curves.

        Raises:
            SetupError: the package of a tracker is not installed.
        """
        for name in settings.trackers:
            if find_spec(name) is None:
                raise SetupError(
                    f"tracking.trackers: '{name}' is not installed; run pip install "
                    "'tunesmith[trackers]' or remove it"
                )
        self.settings = settings
        self.run_dir = run_dir
        self.config = config
        self._trackers: list[GeneralTracker] = []

    def __call__(self, event: Event) -> None:
        """Pass `event` on, where it is a number over steps."""
        match event:
            case RunStarted():
                self._start(event)
            case StepDone():
                self._log(_numbers(event), event.step)
            case Evaluated():
                values = {f"evaluation/{name}": value for name, value in event.metrics.items()}
                self._log(values, event.step)
            case RunFinished():
                self.close()

    def close(self) -> None:
        """Have each tracker write what it still holds."""
        while self._trackers:
            self._trackers.pop().finish()

    def _start(self, event: RunStarted) -> None:
        accelerator = Accelerator(log_with=self.settings.trackers, project_dir=str(self.run_dir))
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": event.step + 1} if event.resumed_from else {},
            "wandb": {"name": self.run_dir.name, "dir": str(self.run_dir), "resume": "allow"},
            "mlflow": {"run_name": self.run_dir.name},
            "trackio": {"name": self.run_dir.name},
        }
        accelerator.init_trackers(
            self.settings.project, dict(_flat(self.config)), init_kwargs=options
        )
        self._trackers = accelerator.trackers

    def _log(self, values: dict[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step=step)


def _numbers(event: StepDone) -> dict[str, float]:
    return {
        "train/loss": event.loss,
        "train/learning_rate": event.learning_rate,
        "train/grad_norm": event.grad_norm,
        "train/tokens_per_second": event.tokens_per_second,
        "train/memory_bytes": event.memory_bytes,
        "train/epoch": event.epoch,
    } | {f"train/{name}": value for name, value in event.metrics.items()}


def _flat(config: Any, path: str = "") -> list[tuple[str, str | float]]:
    """Return nested settings as (dotted.path, value), all that every tracker takes."""
    if isinstance(config, Mapping):
        return [
            pair
            for key, value in config.items()
            for pair in _flat(value, f"{path}.{key}" if path else key)
        ]
    return [(path, config if isinstance(config, str | int | float) else str(config))]
