"""What an align file says: stages that are runs, each built on what the ones before it left."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from tunesmith.data.settings import Source
from tunesmith.errors import SpecError
from tunesmith.rewards.run import RunReward
from tunesmith.rewards.settings import RewardSettings
from tunesmith.settings import Settings
from tunesmith.spec import Run, read_values, validate
from tunesmith.yaml_text import dotted

_OUTPUT: Final = re.compile(r"\$\{([^}.]+)\.(directory|result)\}")
MERGED: Final = "merged"
"""Folder of a run directory with the result as a whole model."""
_NAME: Final = r"^[A-Za-z0-9][\w-]*$"


class OnlineSettings(Settings):
    """Iterated DPO: sample replies, score them, learn from the best against the worst, again."""

    rounds: int = Field(default=3, ge=1)
    """How often all of it is done."""
    prompts: int = Field(default=256, ge=1)
    """Prompts of the stage's training data that a round asks; the next round asks the next ones."""
    samples: int = Field(default=4, ge=2)
    """Replies a prompt, of which the best and the worst are a pair."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampling."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest reply."""
    batch_size: int = Field(default=32, ge=1)
    """Replies written at once."""
    rewards: list[RewardSettings] = Field(min_length=1)
    """What a reply is worth: the weighted sum."""


class Stage(Settings):
    """One stage: a run, with what is special to it over what all share."""

    name: str = Field(pattern=_NAME)
    """Name of the stage and of its run directory."""
    start: str | None = Field(default=None, alias="from")
    """Stage whose result this one starts from; none starts from the base model."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Settings of the run over `common`. `${NAME.directory}` is the run directory of an earlier
    stage, `${NAME.result}` what it trained."""
    online: OnlineSettings | None = None
    """Makes the stage rounds of online DPO, each a run with these settings and fresh pairs."""


class JudgedSettings(Settings):
    """How the final policy is judged against the ones it came from."""

    prompts: list[Source] = Field(min_length=1)
    """Held-out rows; what they ask is asked of every policy."""
    limit: int | None = Field(default=128, ge=2)
    """Use only the first so many prompts; null takes all."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the replies; 0 takes the most likely token."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest reply."""
    batch_size: int = Field(default=32, ge=1)
    """Replies written at once."""
    seed: int = 0
    """Of the sampling, the same for every policy."""
    samples: int = Field(default=8, ge=0)
    """Prompts whose replies the report shows side by side."""
    policies: list[str] = Field(default_factory=list)
    """Stages whose policies are judged, with all that they came from; none takes the last stage."""
    points: int = Field(default=6, ge=0)
    """Checkpoints of the final stage that are judged besides, for the picture of the judge's reward
    against KL; the newest `checkpoint.keep` of that stage are there to choose from."""


class Alignment(Settings):
    """Stages of alignment, and the judgement of what came out."""

    name: str = Field(default="alignment", pattern=r"^[^/\\\s][^/\\]*$")
    """Name of the chain and of its directory; the file's own name where none is given."""
    output: str = "runs"
    """Folder that holds the directory."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Settings of every stage's run."""
    stages: list[Stage] = Field(min_length=1)
    """In the order in which they are run; the last one trains the final policy."""
    at_once: int = Field(default=1, ge=1)
    """Stages that may run at the same time where none of them needs another."""
    judge: list[RewardSettings] | None = None
    """Reward that judges the policies, never one that a stage was trained against: a stage's
    name, the directory of a reward run, or rewards as in `objective.rewards`."""
    judged: JudgedSettings | None = None
    """What is asked, and how replies are written; needs `judge`."""

    @field_validator("judge", mode="before")
    @classmethod
    def _read_judge(cls, value: object) -> object:
        """Let a text be a reward run, and one reward stand without a list."""
        if isinstance(value, str):
            return [{"kind": "run", "path": value}]
        return [value] if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _stages_follow(self) -> Self:
        names: list[str] = []
        for stage in self.stages:
            if stage.name in names:
                raise ValueError(f"two stages are called {stage.name!r}; give one another name")
            for name in self._used(stage):
                if name not in names:
                    known = ", ".join(names) or "none"
                    raise ValueError(
                        f"stage {stage.name!r} needs {name!r}, which is no stage before it; those "
                        f"before it are: {known}"
                    )
            names.append(stage.name)
        return self

    @model_validator(mode="after")
    def _judged_policies_are_stages(self) -> Self:
        names = [stage.name for stage in self.stages]
        for name in self.judged.policies if self.judged else []:
            if name not in names:
                raise ValueError(
                    f"judged.policies: {name!r} is no stage; the stages are {', '.join(names)}"
                )
        return self

    @model_validator(mode="after")
    def _judge_is_fair(self) -> Self:
        if (self.judge is None) != (self.judged is None):
            raise ValueError("`judge` says who judges and `judged` what; give both or neither")
        trained_against = {
            self._where(path)
            for stage in self.stages
            for path in reward_paths(self._settings(stage))
        }
        for reward in self.judge or []:
            if isinstance(reward, RunReward) and self._where(reward.path) in trained_against:
                raise ValueError(
                    f"the judge {reward.path} is a reward that a stage is trained against, which "
                    "cannot tell whether the policy got better or found its faults; train another "
                    "one on other rows, or from another seed"
                )
        return self

    @property
    def directory(self) -> Path:
        """Where the chain and its runs lie."""
        return Path(self.output) / self.name

    def stage(self, name: str) -> Stage:
        """Return the stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def needs(self, stage: Stage) -> list[str]:
        """Return the stages that this one uses, in their order."""
        used = self._used(stage)
        return [other.name for other in self.stages if other.name in used]

    def _used(self, stage: Stage) -> list[str]:
        """Return the names of what a stage says it needs, which may be no stages."""
        settings = self._settings(stage)
        rewards = reward_paths(settings["online"])
        return [
            *([stage.start] if stage.start else []),
            *(name for name, _ in _OUTPUT.findall(yaml.safe_dump(settings))),
            *(path for path in rewards if path in {other.name for other in self.stages}),
        ]

    def _settings(self, stage: Stage) -> dict[str, Any]:
        """Return all that a stage's run and rounds are told, what is common to all included."""
        return stage.model_dump(mode="json") | {"run": merged(self.common, stage.run)}

    def run_of(self, stage: Stage, source: str) -> Run:
        """Return the run of a stage; stages that it starts from need not be there yet.

        Raises:
            SpecError: it says something that no run can mean.
        """
        values = merged(self.common, stage.run)
        if stage.start:
            model = values.setdefault("model", {})
            # One adapter is folded into the base while loading; more than one is written out whole.
            whole = self.is_whole(stage.start)
            model["name" if whole else "adapter"] = str(self._result(stage.start))
            if whole:
                model.pop("adapter", None)
        values = self.filled(values)
        values |= {"name": stage.name, "output": os.path.abspath(self.directory)}
        return validate(values, source=f"{source}: stage {stage.name}", lines={})

    def filled(self, value: Any) -> Any:
        """Return settings with every `${stage.directory}` and `${stage.result}` put in."""
        if isinstance(value, Mapping):
            return {key: self.filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.filled(inner) for inner in value]
        return _OUTPUT.sub(self._output, value) if isinstance(value, str) else value

    def with_paths(self, rewards: Sequence[RewardSettings]) -> list[RewardSettings]:
        """Return rewards with the paths of stages put in."""
        return [
            reward.model_copy(update={"path": self._where(reward.path)})
            if isinstance(reward, RunReward)
            else reward
            for reward in rewards
        ]

    def to_yaml(self) -> str:
        """Return the file that says exactly this."""
        values = self.model_dump(mode="json", by_alias=True)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def _where(self, path: str) -> str:
        """Return a path with stages put in; the bare name of a stage is its directory."""
        if path in {stage.name for stage in self.stages}:
            path = f"${{{path}.directory}}"
        return os.path.abspath(str(self.filled(path)))

    def _output(self, found: re.Match[str]) -> str:
        name, what = found.groups()
        return str(self._result(name) if what == "result" else self.run_directory(name))

    def run_directory(self, name: str) -> Path:
        """Return the run directory of a stage; of rounds, that of the last."""
        stage = self.stage(name)
        inner = [f"round-{stage.online.rounds}"] if stage.online else []
        return Path(os.path.abspath(self.directory)).joinpath(name, *inner)

    def is_whole(self, name: str) -> bool:
        """Return whether a stage's result is a whole model, and not an adapter of the base."""
        stage = self.stage(name)
        return self.trains_all(stage) or bool(stage.start) or stage.online is not None

    def trains_all(self, stage: Stage) -> bool:
        """Return whether the stage's method leaves a whole model."""
        method = merged(self.common, stage.run).get("method", {})
        return isinstance(method, Mapping) and method.get("name") == "full"

    def merges(self, name: str) -> bool:
        """Return whether the stage's adapter has to be merged into a model for a later stage."""
        wanted = any(stage.start == name for stage in self.stages)
        return wanted and self.is_whole(name) and not self.trains_all(self.stage(name))

    def _result(self, name: str) -> Path:
        if not self.is_whole(name):
            return self.run_directory(name) / "adapter"
        folder = "model" if self.trains_all(self.stage(name)) else MERGED
        return self.run_directory(name) / folder


def load_alignment(path: str | Path, overrides: list[str] | None = None) -> Alignment:
    """Read an align file and apply `key=value` overrides; every stage's run is checked.

    Raises:
        SpecError: the file is missing or says something that no chain can mean.
    """
    values, _ = read_values(path, overrides or [])
    values.setdefault("name", Path(path).stem)
    try:
        alignment = Alignment.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{path}: {dotted(problem['loc']) or 'the chain'}: "
            + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        ]
        raise SpecError("\n".join(lines)) from None
    for stage in alignment.stages:
        alignment.run_of(stage, str(path))
    return alignment


def merged(one: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `one` with the settings of `over` over it, mapping by mapping; lists are replaced.

    A method, objective or source that `over` names anew replaces the other whole, for settings of
    one kind mean nothing to another.
    """
    result: dict[str, Any] = copy.deepcopy(dict(one))
    for key, value in over.items():
        known = result.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            other = "name" in value and key != "model" and value["name"] != known.get("name")
            result[key] = copy.deepcopy(dict(value)) if other else merged(known, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def reward_paths(value: object) -> list[str]:
    """Return the path of every `kind: run` in settings."""
    if isinstance(value, Mapping):
        own = [str(value["path"])] if value.get("kind") == "run" and "path" in value else []
        return own + [path for inner in value.values() for path in reward_paths(inner)]
    return [p for inner in value for p in reward_paths(inner)] if isinstance(value, list) else []
