"""The typed run spec: all that a run file may say, composed of each room's own settings."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError
from pydantic.fields import FieldInfo

from tunesmith.data.settings import DataSettings, Source
from tunesmith.engine.settings import (
    CheckpointSettings,
    EngineSettings,
    EvaluationSettings,
    TrackingSettings,
    TrainSettings,
)
from tunesmith.errors import SpecError
from tunesmith.methods import LoRA, MethodUnion
from tunesmith.models.settings import ModelSettings
from tunesmith.objectives import SFT, Distillation, ObjectiveUnion
from tunesmith.objectives.sampling import FromReplies
from tunesmith.settings import Settings
from tunesmith.yaml_text import Place, dotted, parse_mapping, parse_value

_ONE, _SEVERAL = "one method", "several methods"


def _how_many(value: object) -> str:
    """Return the tag of one method, or of several in a list."""
    return _SEVERAL if isinstance(value, list | tuple) else _ONE


Methods = Annotated[
    Annotated[MethodUnion, Tag(_ONE)]
    | Annotated[list[MethodUnion], Field(min_length=1), Tag(_SEVERAL)],
    Discriminator(_how_many),
]


class Run(Settings):
    """One training job: model, method, objective, data and engine settings."""

    name: str = Field(default="run", pattern=r"^[^/\\\s][^/\\]*$")
    """Name of the run and of its directory; the run file's own name where none is given."""
    output: str = "runs"
    """Folder that holds the run directory."""
    seed: int = Field(default=0, ge=0)
    """Decides initial weights, data order and dropout."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    method: Methods = LoRA()
    """What is trained: one method, or a list of methods side by side, each of which then learns at
    its own default rate where train.learning_rate is not given."""
    objective: Annotated[ObjectiveUnion, Field(discriminator="name")] = SFT()
    """What is optimised."""
    data: DataSettings
    """What it learns from and is judged on."""
    train: TrainSettings = TrainSettings()
    """How long, how fast, with which optimiser."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """When and what to measure."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """What is kept on disk while training."""
    engine: EngineSettings = EngineSettings()
    """How the step is computed."""
    tracking: TrackingSettings = TrackingSettings()
    """Where else the events go."""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.output) / self.name

    @property
    def methods(self) -> tuple[MethodUnion, ...]:
        """What is trained, as a sequence also where it is one method."""
        return tuple(self.method) if isinstance(self.method, list) else (self.method,)

    @property
    def method_name(self) -> str:
        """The method's name; several are joined as in lora+prefix_tuning."""
        return "+".join(method.name for method in self.methods)

    def resolved(self) -> Run:
        """Return this run with absolute paths and the learning rate the method would take.

        Methods whose default rates differ keep each its own, which no single number says.
        """
        rates = {method.default_learning_rate for method in self.methods}
        own = rates.pop() if len(rates) == 1 else None
        evaluation = self.evaluation
        if isinstance(self.objective, FromReplies) and evaluation.best == "loss":
            # Without known replies there is no loss that could choose the best checkpoint.
            evaluation = evaluation.model_copy(update={"best": "reward"})
        objective = self.objective
        if isinstance(objective, Distillation):
            teacher = _resolve_model(objective.teacher)
            objective = objective.model_copy(update={"teacher": teacher})
        return self.model_copy(
            update={
                "output": os.path.abspath(self.output),
                "model": _resolve_model(self.model),
                "objective": objective,
                "data": self.data.model_copy(
                    update={
                        name: [_resolve_source(source) for source in getattr(self.data, name)]
                        for name in ("train", "pretraining", "evaluation")
                    }
                ),
                "evaluation": evaluation,
                "train": self.train.model_copy(
                    update={"learning_rate": self.train.learning_rate or own}
                ),
            }
        )

    def to_yaml(self) -> str:
        """Return the run file that says exactly this."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file and apply `key.subkey=value` overrides.

    Raises:
        SpecError: the file is missing or says something that no run can mean; every problem is a
            line of the message, with file, line and key.
    """
    values, lines = read_values(path, overrides)
    values.setdefault("name", Path(path).stem)
    return validate(values, source=str(path), lines=lines)


def read_values(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[Place, int]]:
    """Return what a run file says with overrides applied, unchecked, and the line of each key.

    Raises:
        SpecError: the file is missing or no mapping, or an override is none.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise SpecError(f"{path}: no such run file; `ls examples` shows run files") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not a text file in UTF-8 ({error.reason})") from error
    values, lines = parse_mapping(text, str(path))
    for override in overrides:
        apply_override(values, override, lines)
    return values, lines


def apply_override(values: dict[str, Any], override: str, lines: dict[Place, int]) -> None:
    """Set `a.b.0.c=value` in nested mappings and lists; the value is read as YAML.

    Raises:
        SpecError: no `=`, or the path runs through something that has no keys.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise SpecError(f"{override!r} is not an override; write key.subkey=value")
    parts = key.strip().split(".")
    target: Any = values
    for depth, part in enumerate(parts[:-1]):
        if isinstance(target, list):
            target = target[_index(part, target, key)]
        else:
            target = target.setdefault(part, {})
        if not isinstance(target, dict | list):
            where = ".".join(parts[: depth + 1])
            raise SpecError(f"{key}: {where} is {target!r}, which has no keys below it")
    last = _index(parts[-1], target, key) if isinstance(target, list) else parts[-1]
    target[last] = parse_value(text)
    place: Place = tuple(int(part) if part.isdigit() else part for part in parts)
    for known in [known for known in lines if known[: len(place)] == place]:
        del lines[known]


def _index(part: str, target: list[Any], key: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise SpecError(f"{key}: {part!r} is not one of the {len(target)} items (0 is the first)")
    return int(part)


def validate(values: Mapping[str, Any], *, source: str, lines: Mapping[Place, int]) -> Run:
    """Return the run that `values` describe.

    Raises:
        SpecError: a line for every unknown key and wrong value.
    """
    values = _with_default_names(values)
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{_position(source, place, lines)}: {_explain(problem, place, values)}"
            for problem in error.errors()
            for place in [_place(problem["loc"], values)]
        ]
        raise SpecError("\n".join(problems)) from None


def _with_default_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Let `method.rank: 8` alone mean the default method."""

    def with_name(part: Any, default: str) -> Any:
        return {"name": default} | dict(part) if isinstance(part, Mapping) else part

    named = dict(values)
    for part, default in (("method", LoRA().name), ("objective", SFT().name)):
        given = named.get(part)
        if isinstance(given, list):
            named[part] = [with_name(item, default) for item in given]
        elif part in named:
            named[part] = with_name(given, default)
    return named


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a run file, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Run.model_json_schema(),
        "title": "Tunesmith run file",
    }


def _place(location: Sequence[str | int], values: Any) -> Place:
    """Drop what pydantic adds to a location (the tag of a union) so that the YAML path is left."""
    place: list[str | int] = []
    for position, part in enumerate(location):
        if part in {_ONE, _SEVERAL}:
            continue
        last = position == len(location) - 1
        if isinstance(values, Mapping) and (part in values or last):
            place.append(part)
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            place.append(part)
            values = values[part]
    return tuple(place)


def _position(source: str, place: Place, lines: Mapping[Place, int]) -> str:
    for length in range(len(place), 0, -1):
        if place[:length] in lines:
            return f"{source}:{lines[place[:length]]}"
    return source


def _explain(problem: Any, place: Place, values: Any) -> str:
    where, kind, value = dotted(place), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = _known_keys(place[:-1], values)
        near = _nearest(str(place[-1]), known)
        return f"{where}: unknown key{near}; known here: {known_list(known)}"
    if kind == "missing":
        return f"{where}: is required"
    if kind in {"model_attributes_type", "model_type"}:
        keys = known_list(_known_keys(place, values))
        return f"{where}: {value!r} must be a mapping with keys among {keys}"
    if kind == "union_tag_invalid":
        allowed = [tag.strip("'\" ") for tag in problem["ctx"].get("expected_tags", "").split(",")]
        return _unknown_name(where, value, allowed, problem["ctx"]["discriminator"].strip("'"))
    if kind == "literal_error":
        return f"{where}: {value!r} is not allowed; use {problem['ctx']['expected']}"
    return f"{where}: {value!r}: {problem['msg'].lower()}"


def _unknown_name(where: str, value: Any, allowed: list[str], key: str) -> str:
    given = value[key]
    near = _nearest(str(given), allowed)
    return f"{where}.{key}: {given!r} is unknown{near}; use one of {known_list(allowed)}"


def known_list(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    return ", ".join(names) if names else "nothing"


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _known_keys(place: Place, values: Any) -> list[str]:
    """Return the keys that the settings class at `place` knows."""
    candidates: list[type[BaseModel]] = [Run]
    for part in place:
        values = values[part]
        if isinstance(part, str):
            fields = [m.model_fields[part] for m in candidates if part in m.model_fields]
            candidates = [model for field in fields for model in _models_in(field.annotation)]
        named = [model for model in candidates if _has_name(model.model_fields, values)]
        candidates = named or candidates
    known = [item for model in candidates for item in model.model_fields.items()]
    return sorted({field.alias or name for name, field in known})


def _has_name(fields: Mapping[str, FieldInfo], values: Any) -> bool:
    return (
        isinstance(values, Mapping)
        and "name" in fields
        and fields["name"].default == values.get("name")
    )


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is not None or isinstance(annotation, types.UnionType):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []


def _absolute(name: str) -> str:
    return os.path.abspath(name) if Path(name).exists() else name


def _resolve_model(model: ModelSettings) -> ModelSettings:
    adapter = model.adapter and os.path.abspath(model.adapter)
    return model.model_copy(update={"name": _absolute(model.name), "adapter": adapter})


def _resolve_source(source: Source) -> Source:
    is_glob = any(sign in source.path for sign in "*?[")
    if not is_glob and not Path(source.path).exists():
        return source
    return source.model_copy(update={"path": os.path.abspath(source.path)})
