"""One self-contained HTML page of a chain of alignment: stages, policies, replies side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tunesmith.errors import CheckpointError
from tunesmith.report import words
from tunesmith.report.curves import LINE, MARK, TEXT, Chart
from tunesmith.report.scatter import Dot, drawn, label
from tunesmith.report.template import fill

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NONE: Final = "\u2013"

POLICY_COLUMNS: Final = (
    "",
    "judge's reward",
    "95 % interval",
    "wins",
    "prefers the better of a pair",
    "KL (nats a reply)",
    "tokens a reply",
    "ended by itself",
    "distinct-1",
    "distinct-2",
    "self-BLEU",
)


def write_alignment_report(found: Mapping[str, Any], path: Path) -> Path:
    """Write the page of what alignment.json holds; it needs no network and no other file.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(render(found), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    return path


def render(found: Mapping[str, Any]) -> str:
    """Return the page."""
    verdicts = found["verdicts"]
    rows = [[v["name"], *policy_cells(v)] for v in verdicts if v["step"] is None]
    # A column of which nothing is known would push others out of sight.
    told = [at for at in range(len(POLICY_COLUMNS)) if any(row[at] != _NONE for row in rows)]
    return fill(
        "alignment.html.jinja",
        name=found["name"],
        lead=_lead(found),
        sentences=sentences(verdicts),
        stages=[_stage(stage) for stage in found["stages"]],
        columns=[POLICY_COLUMNS[at] for at in told],
        policies=[[row[at] for at in told] for row in rows],
        charts=charts(verdicts),
        samples=found["samples"],
    )


def policy_cells(verdict: Mapping[str, Any]) -> list[str]:
    """Return one policy's row of the table, without its name."""
    wins = [f"{share:.0%} against {name}" for name, share in verdict["won"].items()]
    return [
        f"{verdict['reward']:.4g}",
        f"{verdict['low']:.4g} to {verdict['high']:.4g}",
        ", ".join(wins) or _NONE,
        _or(verdict.get("prefers"), "{:.1%}"),
        _or(verdict["kl"], "{:.3g}"),
        f"{verdict['length']:.1f}",
        f"{verdict['ended']:.0%}",
        _or(verdict["distinct_1"], "{:.3f}"),
        _or(verdict["distinct_2"], "{:.3f}"),
        f"{verdict['self_bleu']:.1f}",
    ]


def sentences(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the judgement comes down to, with warnings of what often goes wrong."""
    policies = {v["name"]: v for v in verdicts if v["step"] is None}
    built_on = {name for v in policies.values() for name in v["won"]}
    finals = [v for v in policies.values() if v["won"] and v["name"] not in built_on]
    return [
        *(line for final in finals for line in _outcome(final, policies[_start(final)])),
        *_over_optimised(verdicts),
    ]


def _start(policy: Mapping[str, Any]) -> str:
    """Return the name of what a policy's own stage started from."""
    return str(list(policy["won"])[-1])


def _outcome(final: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    share = final["won"][before["name"]]
    said = [
        f"The judge prefers {final['name']} to {before['name']} on {share:.0%} of the held-out "
        f"prompts; its mean reward is {final['reward']:.4g} against {before['reward']:.4g}."
    ]
    alone = (final["low"] - before["reward"], final["high"] - before["reward"])
    low, high = final.get("ahead", {}).get(before["name"], alone)
    if low <= 0 <= high:
        said.append(f"That difference of {final['name']} lies within the interval of chance.")
    if final["length"] > 1.5 * before["length"]:
        said.append(
            f"Replies of {final['name']} grew from {before['length']:.0f} to {final['length']:.0f} "
            "tokens: check that the rewards do not pay for length."
        )
    if (final["distinct_2"] or 0) < 0.6 * (before["distinct_2"] or 0):
        said.append(
            f"Replies of {final['name']} became alike: distinct-2 fell from "
            f"{before['distinct_2']:.3f} to {final['distinct_2']:.3f}."
        )
    return said


def _over_optimised(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    course = _course(verdicts)
    best = max(course, key=lambda v: v["reward"], default=None)
    if best is None or best["reward"] <= course[-1]["high"]:
        return []
    at = best["name"] if best["step"] is None else f"step {best['step']}"
    return [
        f"The judge's reward was highest at {at} ({best['reward']:.4g}) and fell after it: the "
        "policy was optimised beyond what its own reward is good for; stop there, or raise the "
        "weight of KL."
    ]


def charts(verdicts: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return the judge's reward against KL along the final stage, where it has points for it."""
    course = _course(verdicts)
    if len(course) < 3:
        return []
    kls = [verdict["kl"] or 0.0 for verdict in course]
    # The KL of replies need not grow with the steps, so every point says which it is.
    names = ["start", *(f"step {verdict['step']}" for verdict in course[1:-1]), "end"]

    def plot(axes: Axes) -> None:
        rewards = [verdict["reward"] for verdict in course]
        for kl, verdict in zip(kls, course, strict=True):
            axes.plot([kl, kl], [verdict["low"], verdict["high"]], color=TEXT, lw=1, alpha=0.6)
        axes.plot(kls, rewards, color=LINE, lw=1.2)
        axes.plot(kls, rewards, "o", ms=5, color=MARK)
        points = zip(names, kls, rewards, strict=True)
        label(axes, [Dot(name, kl, reward, None, None) for name, kl, reward in points])

    first, last = course[0], course[-1]
    caption = (
        f"Judge's reward {first['reward']:.4g} at the start and {last['reward']:.4g} at KL "
        f"{kls[-1]:.3g}; {len(course)} points."
    )
    title = "The judge's reward against KL (over-optimisation shows as a fall on the right)"
    x = "KL to the start of the stage (nats a reply)"
    return [drawn(title, caption, plot, x=x, y="judge's reward", size=(7.4, 4.0))]


def _course(verdicts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the final stage from its start over its checkpoints to its end."""
    policies = {v["name"]: v for v in verdicts if v["step"] is None}
    steps = sorted((v for v in verdicts if v["step"] is not None), key=lambda v: v["step"])
    name = steps[0]["name"].rsplit("-step-", 1)[0] if steps else next(reversed(policies), None)
    final = policies.get(name, {"won": {}})
    if not final["won"]:
        return []
    return [dict(policies[_start(final)]) | {"kl": 0.0}, *steps, final]


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    before, after = stage["before"], stage["after"]
    names = list(dict.fromkeys((*after, *before)))
    return {
        "name": stage["name"],
        "about": f"{stage['objective']} with {stage['method']}"
        + (f", from {stage['start']}" if stage["start"] else ""),
        "steps": words.count(stage["steps"]),
        "time": words.duration(stage["seconds"]),
        "report": stage["report"],
        "metrics": [
            (
                words.metric_name(name),
                words.metric(name, before.get(name)),
                words.metric(name, after.get(name)),
            )
            for name in names
        ],
    }


def _lead(found: Mapping[str, Any]) -> str:
    names = " \u2192 ".join(stage["name"] for stage in found["stages"])
    judged = f" Judged on {found['prompts']} held-out prompts." if found["verdicts"] else ""
    return f"{found['model']}: {names}.{judged}"


def _or(value: float | None, form: str) -> str:
    return _NONE if value is None else form.format(value)
