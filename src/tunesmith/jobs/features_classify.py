"""scikit-learn's classifiers over features."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tunesmith.errors import CheckpointError, DataError, SetupError

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from tunesmith.jobs.features_spec import FeatureSettings

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

LINEAR: Final = ("logistic_regression", "linear_svm")
PENALTIES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of C that are tried."""
FOLDS: Final = 5


@dataclass(frozen=True)
class LinearMap:
    """What a fitted linear classifier is: one score a class, the largest of which is given."""

    weight: Floats
    """(classes, width), of features as they come out of the model."""
    bias: Floats
    """(classes,)."""

    def __call__(self, features: Floats) -> Integers:
        """Return the class of each row, (rows,) int64."""
        return self.scores(features).argmax(axis=1)

    def scores(self, features: Floats) -> Floats:
        """Return w . x + b of each class, (rows, classes) float32."""
        return features @ self.weight.T + self.bias

    def save(self, path: Path, *, labels: Sequence[str], pooling: str) -> None:
        """Write weight and bias as safetensors; labels and pooling stand in its metadata."""
        save_file(
            {"weight": self.weight, "bias": self.bias},
            path,
            metadata={"labels": json.dumps(list(labels)), "pooling": pooling},
        )


class SavedLinear(NamedTuple):
    """What a file of a linear classifier holds."""

    linear: LinearMap
    labels: tuple[str, ...]
    pooling: str


def read_linear(path: Path) -> SavedLinear:
    """Return what `LinearMap.save` wrote.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata()
            linear = LinearMap(file.get_tensor("weight"), file.get_tensor("bias"))
            return SavedLinear(linear, tuple(json.loads(about["labels"])), about["pooling"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is damaged ({error}); `tunesmith features` with the run's run.yaml writes it "
            "again"
        ) from error


@dataclass(frozen=True)
class Fitted:
    """A classifier that has learned."""

    predict: Callable[[Floats], Integers]
    """From (rows, width) float32 to classes (rows,) int64; a `LinearMap` where it is linear."""
    coefficients: int | None
    """How many numbers it learned; None for trees."""
    C: float | None
    """The weight of the loss that was taken; None for trees."""

    @property
    def linear(self) -> LinearMap | None:
        """The map, where it is one."""
        return self.predict if isinstance(self.predict, LinearMap) else None


def require_classifiers() -> None:
    """Check that scikit-learn is there, before anything is computed for it.

    Raises:
        SetupError: it is not.
    """
    _sklearn("base")


def fit(
    settings: FeatureSettings,
    features: Floats,
    targets: Integers,
    *,
    labels: Sequence[str],
    class_weights: Floats | None,
    seed: int,
) -> Fitted:
    """Return the classifier that `settings` name, fitted to the training rows.

    Args:
        settings: which classifier, and its numbers.
        features: (rows, width) float32, finite.
        targets: (rows,) int64, indices into `labels`.
        labels: names of the classes.
        class_weights: (classes,) weight of a row by its class, or None where all count alike.
        seed: of folds and trees.

    Raises:
        DataError: a class has no row to learn from.
        SetupError: scikit-learn is not installed.
    """
    counts = np.bincount(targets, minlength=len(labels))
    if (counts == 0).any():
        raise DataError(
            f"objective.labels: '{labels[int(counts.argmin())]}' has no training row, so features "
            "cannot tell it; add rows, or leave the label out"
        )
    weights = None if class_weights is None else class_weights[targets]
    if settings.classifier in LINEAR:
        folds = min(FOLDS, int(counts.min()))
        return _fit_linear(settings, features, targets, weights, folds=folds, seed=seed)
    trees = _trees(settings, seed).fit(features, targets, sample_weight=weights)
    return Fitted(trees.predict, None, None)


def _fit_linear(
    settings: FeatureSettings,
    features: Floats,
    targets: Integers,
    weights: Floats | None,
    *,
    folds: int,
    seed: int,
) -> Fitted:
    """Fit to standardised features, for which one penalty suits every model."""
    mean = features.mean(axis=0, dtype=np.float64)
    spread = features.std(axis=0, dtype=np.float64)
    spread[spread == 0] = 1.0
    inputs = (features - mean) / spread
    classifier, C = _linear(settings, seed), settings.C
    if C is None:
        C = _best_penalty(classifier, inputs, targets, weights, folds=folds, seed=seed)
    classifier.set_params(C=C).fit(inputs, targets, sample_weight=weights)
    # Scores of the plain features: w . (x - mean) / spread + b.
    weight = classifier.coef_ / spread
    bias = classifier.intercept_ - weight @ mean
    coefficients = weight.size + bias.size
    if len(weight) == 1:  # two classes have one score, which is against 0
        weight, bias = np.vstack([0 * weight, weight]), np.append(0.0, bias)
    # safetensors writes memory as it lies, and coef_ may lie column by column.
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    linear = LinearMap(weight, bias.astype(np.float32))
    return Fitted(linear, coefficients, C)


def _best_penalty(
    classifier: Any,
    inputs: NDArray[np.float64],
    targets: Integers,
    weights: Floats | None,
    *,
    folds: int,
    seed: int,
) -> float:
    """Return the C with the highest accuracy in cross-validation over the training rows."""
    if folds < 2:
        return PENALTIES[len(PENALTIES) // 2]  # a class of one row leaves nothing to judge by
    selection = _sklearn("model_selection")
    parts = selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    search = selection.GridSearchCV(classifier, {"C": PENALTIES}, cv=parts, refit=False)
    search.fit(inputs, targets, sample_weight=weights)
    return float(search.best_params_["C"])


def _linear(settings: FeatureSettings, seed: int) -> Any:
    linear_model, svm = _sklearn("linear_model"), _sklearn("svm")
    if settings.classifier == "logistic_regression":
        return linear_model.LogisticRegression(max_iter=1000)
    return svm.LinearSVC(max_iter=10_000, random_state=seed)


def _trees(settings: FeatureSettings, seed: int) -> Any:
    ensemble = _sklearn("ensemble")
    if settings.classifier == "random_forest":
        return ensemble.RandomForestClassifier(settings.trees, random_state=seed, n_jobs=-1)
    return ensemble.HistGradientBoostingClassifier(max_iter=settings.trees, random_state=seed)


def _sklearn(module: str) -> ModuleType:
    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise SetupError(
            "features needs scikit-learn, which is not installed; pip install 'tunesmith[metrics]'"
        ) from error
