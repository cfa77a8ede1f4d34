"""Which method to try first: what fits, what was measured, and the rules of the field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final, Literal, get_args

import psutil
import torch
import yaml

from tunesmith.errors import MethodError, ModelError, SpecError
from tunesmith.jobs.comparison_spec import METHODS
from tunesmith.jobs.default_run import Purpose, default_run
from tunesmith.jobs.evidence import Evidence, known_evidence
from tunesmith.jobs.plan import Plan, plan
from tunesmith.jobs.remedies import remedies
from tunesmith.measure.memory_plan import bytes_of
from tunesmith.report import words
from tunesmith.report.findings import Findings, FoundRow
from tunesmith.spec import validate

Goal = Literal["quality", "memory", "speed", "many-tasks", "edge"]

EVIDENCE_POINTS: Final = 10.0
"""Between the best and the worst row of a comparison: more than all rules together can give."""
SIMILAR: Final = 8
"""Models within so many times each other's size are taken to behave alike."""
SHOWN: Final = 5
"""Methods that advice ranks."""
HEADROOM: Final = 0.95
"""Of the memory may be planned for: an allocator loses some between its blocks."""


@dataclass
class Advice:
    """One method, and why it stands where it does."""

    method: str
    points: float = 0.0
    reasons: list[str] = field(default_factory=list)
    planned: Plan | None = None
    """What the run below needs."""

    def to_yaml(self) -> str:
        """Return a run file that can be started as it is, without what is at its default."""
        assert self.planned is not None  # noqa: S101 - advice is given on what was planned
        said = self.planned.run.model_dump(mode="json", exclude_unset=True)
        return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class _Case:
    """What advice is asked for."""

    purpose: Purpose
    goal: Goal
    memory: int
    device: str
    parameters: int
    full_fits: bool


def advise(
    model: str, data: str, *, memory: int, goal: Goal = "quality", device: str = "cuda"
) -> list[Advice]:
    """Return the methods to try, the first first, each with a run that fits.

    Comparisons of the same task on a model of like size count most, this user's own before ours;
    then the rules in advice.yaml. What does not fit into `memory`, not even with smaller
    micro-batches, checkpointing or a 4-bit base, is left out.

    Args:
        model: a path, zoo name or Hub id.
        data: a file, folder, zoo name or Hub data set.
        memory: bytes of the device.
        goal: what matters.
        device: `cuda` or `cpu`.

    Raises:
        SpecError: nothing fits.
    """
    purpose = default_run(model, data)
    full = _planned(purpose, "full", device)
    case = _Case(
        purpose,
        goal,
        memory,
        device,
        parameters=full.counts.base,
        full_fits=full.alone.peak <= HEADROOM * memory,
    )
    ranked = sorted(_scored(case), key=lambda advice: -advice.points)
    fitting: list[Advice] = []
    for advice in ranked:
        if _make_fit(advice, case):
            fitting.append(advice)
        if len(fitting) == SHOWN:
            break
    if not fitting:
        raise SpecError(
            f"--memory: nothing that trains {model} fits into {words.size(memory)}; take a smaller "
            "model, shorter rows, or more memory"
        )
    return fitting


def _planned(purpose: Purpose, method: str, device: str) -> Plan:
    values = purpose.settings | {"name": f"advised-{method}", "method": {"name": method}}
    return plan(validate(values, source="advice", lines={}), device=device)


def _scored(case: _Case) -> list[Advice]:
    """Return every method with its points and reasons, not yet in order."""
    advices = {name: Advice(name) for name in METHODS}
    for evidence in known_evidence():
        if _is_similar(evidence, case):
            _weigh(evidence, advices)
    for rule in _rules():
        if _holds(rule["when"], case):
            for name in rule["methods"]:
                advices[name].points += rule["points"]
                sign = "for" if rule["points"] > 0 else "against"
                advices[name].reasons.append(f"{sign} it: {rule['why']} ({rule['source']})")
    return list(advices.values())


def _is_similar(evidence: Evidence, case: _Case) -> bool:
    if evidence.task != case.purpose.task or evidence.kind != case.purpose.kind:
        return False
    sizes = sorted((max(1, evidence.parameters), case.parameters))
    return sizes[1] <= SIMILAR * sizes[0]


def _weigh(evidence: Evidence, advices: dict[str, Advice]) -> None:
    """Give each method points by where its row stands between the best and the worst."""
    found = evidence.findings
    trained = found.trained
    if len(trained) < 2 or not found.learned():
        return
    best, worst = trained[0], trained[-1]
    span = abs((best.quality or 0) - (worst.quality or 0)) or 1.0
    equal = {row.name for row in found.as_good_as_best()} if best.low is not None else set()
    whose = "here" if evidence.here else "by us"
    for place, row in enumerate(trained, start=1):
        if row.name in advices:
            share = 1 - abs((best.quality or 0) - (row.quality or 0)) / span
            # Among rows that cannot be told apart the rules choose: by cost, say, as the goal asks.
            share = 1.0 if row.name in equal else share
            advices[row.name].points += EVIDENCE_POINTS * (share - 0.5) + (row.name in equal)
            advices[row.name].reasons.append(_measured(found, row, place, whose))


def _measured(found: Findings, row: FoundRow, place: int, whose: str) -> str:
    parts = [f"{words.metric(found.metric, row.quality)}"]
    if row.stored_bytes:
        parts.append(f"{words.size(row.stored_bytes)} stored")
    if row.seconds_per_step:
        parts.append(f"{row.seconds_per_step:.3f} s a step")
    if row.forgetting is not None:
        parts.append(f"{row.forgetting:+.2f} nats on general text")
    if found.one_seed:
        parts.append("one seed")
    model = found.facts.get("model", "a model")
    return (
        f"measured {whose} ({found.name}, {model}): place {place} of {len(found.trained)}, "
        f"{words.metric_name(found.metric)} {', '.join(parts)}"
    )


def _rules() -> list[dict[str, Any]]:
    text = (resources.files("tunesmith.jobs") / "advice.yaml").read_text(encoding="utf-8")
    rules: list[dict[str, Any]] = yaml.safe_load(text)
    return rules


def _holds(when: dict[str, Any], case: _Case) -> bool:
    """Return whether all conditions of a rule hold."""
    rows, parameters = case.purpose.rows, case.parameters
    tests: dict[str, Callable[[Any], bool]] = {
        "goal": lambda wanted: case.goal == wanted,
        "task": lambda wanted: case.purpose.task == wanted,
        "rows_below": lambda limit: rows < limit,
        "rows_above": lambda limit: rows > limit,
        "parameters_below": lambda limit: parameters < limit,
        "parameters_above": lambda limit: parameters > limit,
        "full_fits": lambda wanted: case.full_fits == wanted,
    }
    return all(tests[key](value) for key, value in when.items())


def _make_fit(advice: Advice, case: _Case) -> bool:
    """Plan the method's run, with what makes it fit where it does not; return whether it does."""
    limit = int(HEADROOM * case.memory)
    try:
        planned = _planned(case.purpose, advice.method, case.device)
    except (MethodError, ModelError):
        return False  # the method cannot work on this architecture
    if planned.alone.peak > limit:
        changes = remedies(planned, limit)
        if not changes:
            return False
        for change in changes:
            advice.reasons.append(f"to fit: {change.change}, which costs {change.price}")
        planned = changes[-1].planned
    advice.planned = planned
    advice.reasons.append(f"needs {words.size(planned.alone.peak)} at the most")
    return True


def goal_of(text: str) -> Goal:
    """Return the goal called `text`.

    Raises:
        SpecError: there is none.
    """
    for goal in get_args(Goal):
        if goal == text:
            return goal
    raise SpecError(f"--goal: {text!r} is none; use one of {', '.join(get_args(Goal))}")


def place_of(memory: str | None) -> tuple[str, int]:
    """Return the device to plan for and its bytes: a GPU of this size, or what this machine has.

    Raises:
        SpecError: `memory` is no size.
    """
    if memory is not None:
        return "cuda", bytes_of(memory)
    if torch.cuda.is_available():
        return "cuda", torch.cuda.mem_get_info()[1]
    return "cpu", psutil.virtual_memory().total


def told(advices: Sequence[Advice]) -> list[str]:
    """Return advice as lines to read."""
    lines = []
    for place, advice in enumerate(advices, start=1):
        lines.append(f"{place}. {advice.method}")
        lines += [f"   - {reason}" for reason in advice.reasons]
    return lines
