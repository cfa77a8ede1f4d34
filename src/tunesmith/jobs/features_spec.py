"""What a run of the feature-based approach says: a run file, and a section `features`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import yaml
from pydantic import Field, ValidationError

from tunesmith.errors import SpecError
from tunesmith.models.embeddings import Pooling
from tunesmith.settings import Settings
from tunesmith.spec import Run, known_list, read_values, validate
from tunesmith.yaml_text import dotted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ClassifierName = Literal["logistic_regression", "linear_svm", "random_forest", "gradient_boosting"]

_IDLE: Final = {"method", "train", "checkpoint", "tracking"}
"""Sections of a run file that say how to train, which nothing does here."""


def file_without_steps(run: Run, section: str, settings: Settings) -> str:
    """Return the run file of a run that takes no steps, with a section of its own."""
    values = run.model_dump(mode="json", exclude=_IDLE)
    values[section] = settings.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


class FeatureSettings(Settings):
    """How texts become features, and which classifier learns from them."""

    pooling: Literal["auto"] | Pooling = "auto"
    """What stands for a text: the last layer's hidden state of its first token (cls), of its last
    one, or the mean over all. Auto is mean for an encoder and last for a decoder."""
    classifier: ClassifierName = "logistic_regression"
    """What scikit-learn fits: a linear one is saved, one of trees is not."""
    C: float | None = Field(default=None, gt=0)
    """Of the linear ones: the weight of the loss against the penalty on standardised features; none
    takes the best of five by cross-validation on the training rows."""
    trees: int = Field(default=200, ge=1)
    """Trees of the forest, or rounds of boosting."""


@dataclass(frozen=True)
class FeatureRun:
    """A run without training; of `run` only what it reads is meant."""

    run: Run
    """Model, objective, data, evaluation, engine and seed."""
    features: FeatureSettings

    def to_yaml(self) -> str:
        """Return the file that says exactly this."""
        return file_without_steps(self.run, "features", self.features)


def load_feature_file(path: str | Path, overrides: Sequence[str] = ()) -> FeatureRun:
    """Read the run file of a classification, which may have a section `features`.

    The objective is `classification` where none is given. Without a name the run is called as its
    file with `-features` behind, so that it lies beside what `tunesmith train` makes of the file.

    Raises:
        SpecError: the file is missing or says something that no such run can mean.
    """
    values, lines = read_values(path, overrides)
    values.setdefault("name", f"{Path(path).stem}-features")
    values.setdefault("objective", {"name": "classification"})
    features = _features(values.pop("features", {}), str(path))
    return FeatureRun(validate(values, source=str(path), lines=lines), features)


def is_feature_file(path: Path) -> bool:
    """Return whether the run file was written by a run of features."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return isinstance(values, dict) and "features" in values


def _features(values: Mapping[str, Any], source: str) -> FeatureSettings:
    try:
        return FeatureSettings.model_validate(values)
    except ValidationError as error:
        known = known_list(list(FeatureSettings.model_fields))
        lines = []
        for problem in error.errors():
            where = dotted(("features", *problem["loc"]))
            more = f"; known here: {known}" if problem["type"] == "extra_forbidden" else ""
            lines.append(f"{source}: {where}: {problem['msg']}{more}")
        raise SpecError("\n".join(lines)) from None
