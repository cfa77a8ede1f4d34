"""From several saved adapters to one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.errors import AdapterError, SpecError
from tunesmith.jobs.run_directory import RunDirectory
from tunesmith.methods.adapter_files import base_name, read_adapters
from tunesmith.methods.combine import recipe
from tunesmith.methods.tuned import TunedModel
from tunesmith.models.settings import ModelSettings
from tunesmith.models.skeleton import empty_on_cpu, skeleton


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
        AdapterError: an adapter is damaged or of another base, or `to` holds other files.
        MethodError: an adapter is no plain LoRA, or a setting has no effect or is out of range.
        ModelError: the base cannot be found.
    """
    chosen = recipe(method, density=density, rank=rank, seed=seed)
    model = skeleton(ModelSettings(name=base or _base(weights)))
    tuned = TunedModel(empty_on_cpu(model.eval()))
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


def _base(weights: Mapping[Path, float]) -> str:
    """Return the name of the base model that the adapters were made on."""
    for directory in weights:
        for adapter in read_adapters(directory):
            if name := base_name(adapter):
                return name
    raise AdapterError("none of the adapters says on which base model it was made; give --base")
