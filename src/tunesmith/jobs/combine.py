"""From several saved adapters to one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import AdapterError, SpecError
from tunesmith.jobs.base import base_of_run, empty_base, require_same_start
from tunesmith.jobs.run_directory import RunDirectory, run_of_adapter
from tunesmith.methods.adapter_files import base_name, read_adapters
from tunesmith.methods.combine import recipe
from tunesmith.methods.tuned import TunedModel
from tunesmith.models.settings import ModelSettings

if TYPE_CHECKING:
    from tunesmith.methods.adapter_files import SavedAdapter


def combine_adapters(
    weights: Mapping[Path, float],
    to: str | Path,
    *,
    method: str = "linear",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    base: str | None = None,
) -> float:
    """Combine saved LoRA adapters of one base into a new one; no weights of the base are loaded.

    The base of runs that started from another's result is the model with that merged in, and so is
    the base of the new adapter.

    Args:
        weights: of the adapters, by their directory.
        to: the directory to write.
        method: linear, cat, svd, ties, dare_linear or dare_ties; see `TunedModel.combine`.
        density: share of each delta's elements that ties and dare keep.
        rank: of the result where it is cut.
        seed: of dare's random choice.
        base: name of the base model, where the adapters do not say it.

    Returns:
        The share of the combined deltas' squared norm that the rank keeps.

    Raises:
        AdapterError: an adapter is damaged, of another base or of a run that started from another
            one, or `to` holds other files.
        MethodError: an adapter is no plain LoRA, or a setting has no effect or is out of range.
        ModelError: the base cannot be found.
        SpecError: what the runs started from is gone, or another one than it was.
    """
    chosen = recipe(method, density=density, rank=rank, seed=seed)
    saved = {directory: read_adapters(directory) for directory in weights}
    found = {directory: base_of_run(run_of_adapter(directory)) for directory in weights}
    of_runs = {directory: settings for directory, settings in found.items() if settings}
    _require_one_start(of_runs, saved)
    settings = ModelSettings(name=base) if base else _base(of_runs, saved)
    tuned = TunedModel(empty_base(settings))
    names = {}
    for number, (directory, weight) in enumerate(weights.items()):
        names[f"adapter_{number}"] = weight
        tuned.load_adapter(f"adapter_{number}", directory, check_base=base is None)
    kept = tuned.combine(
        names, name="combined", method=chosen.method, density=density, rank=rank, seed=seed
    )
    tuned.save(to, "combined")
    return kept


def weighted(arguments: Sequence[str]) -> dict[Path, float]:
    """Return directories and their weights out of DIR=0.7 or DIR, which is 1.

    A run directory stands for its adapter.

    Raises:
        SpecError: a weight is no number, or a directory is named twice.
    """
    found: dict[Path, float] = {}
    for argument in arguments:
        name, _, weight = argument.rpartition("=") if "=" in argument else (argument, "", "1")
        run = RunDirectory(Path(name))
        directory = run.adapter if run.spec.is_file() else run.path
        if directory in found:
            raise SpecError(f"{argument}: {name} is named twice; give it one weight")
        try:
            found[directory] = float(weight)
        except ValueError:
            raise SpecError(
                f"{argument}: {weight!r} is no weight; write DIR=NUMBER, as in runs/a=0.7"
            ) from None
        if not math.isfinite(found[directory]):
            raise SpecError(f"{argument}: the weight must be finite")
    return found


def _require_one_start(
    of_runs: Mapping[Path, ModelSettings], saved: Mapping[Path, Sequence[SavedAdapter]]
) -> None:
    """Check that runs of which some started from another's result all started from the same.

    Raises:
        AdapterError: they did not.
    """
    starts = [
        (directory, settings.adapter, base_name(saved[directory][0]))
        for directory, settings in of_runs.items()
    ]
    for one, other in pairwise(starts):
        (_, first, base), (_, second, other_base) = one, other
        if (first or second) and Path(base).name != Path(other_base).name:
            told = " and ".join(
                f"{directory} was trained on {named!r} (model.adapter: {adapter or 'none'})"
                for directory, adapter, named in (one, other)
            )
            raise AdapterError(f"{told}; combine runs that started from the same")


def _base(
    of_runs: Mapping[Path, ModelSettings], saved: Mapping[Path, Sequence[SavedAdapter]]
) -> ModelSettings:
    """Return what names the base that the adapters were made on: a run's file, or they alone.

    Raises:
        AdapterError: nothing says it.
        SpecError: what a run started from is gone, or another one than it was.
    """
    if of_runs:
        directory, settings = next(iter(of_runs.items()))
        require_same_start(settings, saved[directory])
        return settings
    names = (base_name(adapter) for adapters in saved.values() for adapter in adapters)
    if name := next(filter(None, names), ""):
        return ModelSettings(name=name)
    raise AdapterError("none of the adapters says on which base model it was made; give --base")
