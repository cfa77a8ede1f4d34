"""What a comparison file says: one run, and what is varied in it."""

from __future__ import annotations

import copy
import re
import typing
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from tunesmith.errors import SpecError
from tunesmith.jobs.default_run import default_run
from tunesmith.jobs.features_spec import FeatureSettings
from tunesmith.jobs.prompting_spec import PromptingSettings
from tunesmith.methods import MethodUnion
from tunesmith.settings import Settings
from tunesmith.spec import Run, apply_override, load_run_file, read_values, validate
from tunesmith.yaml_text import dotted

_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}

METHODS = tuple(
    kind.model_fields["name"].default for kind in typing.get_args(typing.get_args(MethodUnion)[0])
)
"""Every method's name."""
FEW: Final = 4
"""Examples of the row of few-shot prompting that comes along with all methods."""


class Variant(Settings):
    """One row of a comparison: the base run with another method, or other settings."""

    name: str | None = Field(default=None, pattern=r"^[^/\\\s]+$")
    """Name of the row; the method's name where none is given. The run's own method needs one."""
    method: str | dict[str, Any] | list[dict[str, Any]] | None = None
    """The method: its name, its settings with `name`, or a list of several; none is the run's."""
    features: FeatureSettings | None = None
    """Instead of a method: classify by the frozen model's features, without training."""
    prompting: PromptingSettings | None = None
    """Instead of a method: ask the untrained model, a decoder, perhaps with examples."""
    set: list[str] = Field(default_factory=list)
    """Further settings over the run's, as on the command line: `train.batch_size=32`."""

    @model_validator(mode="after")
    def _trains_or_not(self) -> Self:
        """Refuse a row that is to train and not to."""
        given = [
            name for name in ("method", "features", "prompting") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"a row has {' or '.join(given)}, not both; make two rows of them")
        if not given and self.name is None:
            raise ValueError("a row of the run's own method has no name; give it one with `name`")
        return self

    @property
    def trains(self) -> bool:
        """Whether a row takes training steps."""
        return self.features is None and self.prompting is None

    @property
    def depends_on_seed(self) -> bool:
        """Whether another seed can give another number."""
        return self.prompting is None or self.prompting.shots > 0

    @property
    def title(self) -> str:
        """The row's name."""
        if self.name is not None:
            return self.name
        if self.features is not None:
            return "features"
        if self.prompting is not None:
            return f"{self.prompting.shots or 'zero'}-shot"
        methods = self.method if isinstance(self.method, list) else [self.method]
        names = [m if isinstance(m, str) else (m or {}).get("name", "lora") for m in methods]
        return "+".join(names)


class Comparison(Settings):
    """Several ways to do one job, measured under equal conditions."""

    name: str = Field(default="comparison", pattern=r"^[^/\\\s][^/\\]*$")
    """Name of the comparison and of its directory; the file's own name where none is given."""
    output: str = "runs"
    """Folder that holds the comparison's directory."""
    run: str | dict[str, Any]
    """The run that is varied: its settings, or the path of a run file beside this file."""
    methods: Literal["all"] | list[str] = Field(default_factory=list)
    """Methods to compare, each with its default settings; `all` is every one there is."""
    variants: list[Variant] = Field(default_factory=list)
    """Further rows, or instead of `methods`."""
    seeds: int = Field(default=3, ge=1)
    """Runs of each row with different initial weights and data order, beginning at run.seed."""
    learning_rates: int = Field(default=3, ge=1)
    """Learning rates tried a row: its default times powers of 3 around 1, at a third of the steps;
    the best goes on. 1 takes the default as it is."""
    metric: str | None = None
    """What decides; the run's first evaluation metric where none is given, else the accuracy of
    texts with one label each, the reward of replies that a run writes itself, else the loss."""
    budget: float | None = Field(default=None, gt=0)
    """Wall-clock time for the whole comparison in seconds, or as text: `20min`, `2h`. Every run
    then gets the same share of it, as so many steps as fit. None runs the run's own steps."""
    jobs: int = Field(default=1, ge=1)
    """Runs at the same time. With more than one, speed is measured afterwards, each row alone."""
    measure_speed: bool = True
    """With several jobs: measure speed. Without it the table has no times, for those of runs beside
    each other say nothing."""

    @field_validator("budget", mode="before")
    @classmethod
    def _read_budget(cls, value: object) -> object:
        """Read `20min` as 1200 seconds."""
        return seconds_of(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        """Refuse a comparison of nothing, or of two rows of one name."""
        names = [variant.title for variant in self.rows()]
        if not names:
            raise ValueError("nothing to compare: give methods (`all`, or a list) or variants")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rows are called {twice[0]!r}; give one of them another name")
        return self

    @property
    def directory(self) -> Path:
        """Where the comparison and its runs lie."""
        return Path(self.output) / self.name

    def rows(self) -> list[Variant]:
        """Return what is compared, one entry a row."""
        methods = list(METHODS) if self.methods == "all" else self.methods
        return [*(Variant(method=name) for name in methods), *self.variants]

    def base(self, source: Path) -> dict[str, Any]:
        """Return the settings of the run that is varied.

        Args:
            source: the comparison file, beside which a run file is looked for.
        """
        if isinstance(self.run, dict):
            return copy.deepcopy(self.run)
        beside = source.parent / self.run
        run = load_run_file(beside if beside.exists() else self.run)
        # What it does not say is left open, so that a comparison's own defaults can act.
        return run.model_dump(mode="json", exclude_unset=True)

    def run_of(self, variant: Variant, source: Path) -> Run:
        """Return the run of one row, as it would be alone.

        Raises:
            SpecError: it says something that no run can mean.
        """
        values = self.base(source)
        values["name"] = variant.title
        if variant.method is not None:
            named = variant.method
            values["method"] = {"name": named} if isinstance(named, str) else named
            # A rate in the base run is for the base's method; each row begins at its own default.
            values.setdefault("train", {}).pop("learning_rate", None)
        for override in variant.set:
            apply_override(values, override, {})
        return validate(values, source=f"{source}: {variant.title}", lines={})

    def to_yaml(self) -> str:
        """Return the comparison file that says exactly this."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_comparison(path: str | Path, overrides: list[str] | None = None) -> Comparison:
    """Read a comparison file and apply `key=value` overrides.

    Raises:
        SpecError: the file is missing or says something that no comparison can mean.
    """
    if not Path(path).is_file():
        raise SpecError(
            f"{path}: no such comparison file; `ls examples/compare-*` shows some, and --model "
            "with --data compares without a file"
        )
    values, _ = read_values(path, overrides or [])
    values.setdefault("name", Path(path).stem)
    if "run" not in values and {"model", "data"} & set(values):
        raise SpecError(
            f"{path}: is a run file, and a comparison file holds a run under `run` and the methods "
            "to compare; `tunesmith train` runs this one"
        )
    return checked(values, source=str(path))


def comparison_from(
    file: str | None,
    overrides: list[str],
    *,
    model: str | None,
    data: str | None,
    methods: str,
    budget: str | None,
) -> tuple[Comparison, Path]:
    """Return what the command line asks for: a file, or a model and data to compare methods on.

    Raises:
        SpecError: neither is given, or both.
    """
    if budget is not None:
        overrides = [*overrides, f"budget={budget}"]
    if file is not None and "=" in file and model:
        overrides, file = [file, *overrides], None  # the first override stands where a file would
    if file is not None:
        if model or data:
            raise SpecError("--model and --data stand for a file; give the file alone, or them")
        return load_comparison(file, overrides), Path(file)
    if model is None or data is None:
        raise SpecError("give a comparison file, or --model and --data")
    purpose = default_run(model, data)
    values: dict[str, Any] = {
        "name": f"compare-{Path(model).name}",
        "run": purpose.settings,
        "metric": purpose.metric,
        "methods": "all" if methods == "all" else methods.split(","),
    }
    if methods == "all" and purpose.task == "sft" and purpose.kind == "decoder":
        values["variants"] = [{"prompting": {"shots": shots}} for shots in (0, FEW)]
    for override in overrides:
        apply_override(values, override, {})
    return checked(values, source="the command line"), Path("command line")


def checked(values: dict[str, Any], *, source: str) -> Comparison:
    """Return the comparison that `values` describe.

    Raises:
        SpecError: a line for every unknown key and wrong value.
    """
    try:
        return Comparison.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = dotted(problem["loc"]) or "the comparison"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                kinds: dict[int, type[Settings]] = {1: Comparison, 3: Variant}
                kind = kinds.get(len(problem["loc"]))
                message = "is no setting"
                message += f"; use one of {', '.join(kind.model_fields)}" if kind else ""
            lines.append(f"{source}: {where}: {message}")
        raise SpecError("\n".join(lines)) from None


def seconds_of(text: str) -> float:
    """Return a length of time such as `90s`, `20min` or `1.5h` in seconds.

    Raises:
        SpecError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in {*_UNITS, ""}:
        raise ValueError(f"{text!r} is no length of time; write 90s, 20min or 2h")
    return float(found[1]) * _UNITS.get(found[2], 1)
