"""Curves of the demonstrations of alignment, out of alignment.json."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.report.alignment import charts
from tunesmith.report.curves import TEXT, Chart, smoothed, standalone
from tunesmith.report.scatter import PALETTE, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = dict[str, Any]
Points = Sequence[tuple[float, float]]
JUDGE = "reward_run_2"
"""The second classifier of examples/ppo-sentiment.yaml, which teaches nothing."""
FAR = 30.0
"""Nats of KL beyond which a run would hide the others in the picture."""
OVER = "over-optimisation.svg"
PPO_REWARD, PPO_KL, GRPO_REWARD = "ppo-reward.svg", "ppo-kl.svg", "grpo-reward.svg"
SIZE = (5.8, 3.4)
SEED = re.compile(r"^ppo-\d+, ")
"""How the name of a seed's run begins."""


def pictures(found: Found) -> dict[str, str]:
    """Return the pictures of docs/ that there are measurements for, by their files' names."""
    made = {}
    if runs := of_objective(found, "ppo-sentiment", "ppo"):
        made[PPO_REWARD] = lines(
            "Held-out judge's reward",
            {name: judge(run) for name, run in runs.items()},
            {name: evaluated(run, JUDGE) for name, run in runs.items()},
            y="reward by the held-out judge",
        )
        held = {name: run for name, run in runs.items() if run["after"]["kl"] < FAR}
        made[PPO_KL] = lines(
            "KL to the reference",
            {name: points(run, "kl") for name, run in held.items()},
            {name: evaluated(run, "kl") for name, run in held.items()},
            y="KL to the reference (nats a reply)",
        )
    if runs := of_objective(found, "grpo-arithmetic", "grpo"):
        made[GRPO_REWARD] = lines(
            "Share of right answers",
            {name: smooth(points(run, "reward")) for name, run in runs.items()},
            {name: evaluated(run, "reward") for name, run in runs.items()},
            y="share of right answers",
        )
    chain = found.get("rlhf-politeness", {})
    if drawings := charts(chain.get("verdicts", [])):
        made[OVER] = drawings[0].svg
    return {name: standalone(svg) for name, svg in made.items()}


def of_objective(found: Found, file: str, objective: str) -> dict[str, Found]:
    """Return the runs with an objective of a demonstration and its variants, by a short name."""
    runs = {}
    for name, one in sorted(found.items(), key=lambda item: item[0] != file):
        if one["file"] == file:
            variant = name.removeprefix(file).removeprefix("-")
            for stage, run in one.get("stages", {"": one}).items():
                if run["objective"] == objective:
                    runs[short(stage, variant, run)] = run
    return runs


def short(stage: str, variant: str, run: Found) -> str:
    """Return what a run is called in tables and pictures: its stage or numbers, and its rate."""
    options = run["data"][0].partition(":")[2].split(",") if run["data"] else []
    given = dict(option.partition("=")[::2] for option in options)
    largest = given.get("largest") or ("9" * int(given["digits"]) if "digits" in given else "")
    called = stage or (f"numbers to {largest}" if largest else variant)
    # A rate's own name says nothing beside the rate.
    how = f", {variant.replace('-', ' ')}" if stage and variant and not variant[0].isdigit() else ""
    return f"{called}{how}, learning rate {run['learning_rate']:g}"


def judge(run: Found) -> list[tuple[float, float]]:
    """Return (step, reward by the judge) of the roll-outs."""
    name = JUDGE.removeprefix("reward_")
    return [(event["step"], event["rewards"][name]) for event in run["course"]]


def points(run: Found, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the roll-outs."""
    return [(event["step"], event[key]) for event in run["course"] if event[key] is not None]


def smooth(course: Points) -> list[tuple[float, float]]:
    """Return points smoothed a little: a roll-out of few prompts says little by itself."""
    values = smoothed([value for _, value in course], 0.7)
    return [(step, value) for (step, _), value in zip(course, values, strict=True)]


def evaluated(run: Found, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the evaluations on held-out prompts."""
    return [(step, value) for step, value in run["evaluations"].get(key, [])]


def lines(title: str, courses: Mapping[str, Points], dots: Mapping[str, Points], *, y: str) -> str:
    """Return roll-outs as lines with the evaluations as dots on top, as SVG.

    Seeds of the same settings share a colour.
    """
    groups: dict[str, list[str]] = {}
    for name in courses:
        groups.setdefault(SEED.sub("", name), []).append(name)

    def plot(axes: "Axes") -> None:
        for colour, (group, names) in zip(PALETTE, groups.items(), strict=False):
            label = f"{group}, {len(names)} seeds" if len(names) > 1 else group
            for name in names:
                axes.plot(*columns(courses[name]), color=colour, lw=1.4, label=label)
                axes.plot(*columns(dots[name]), "o", color=colour, ms=5)
                label = "_"  # no second line of the legend
        axes.legend(frameon=False, labelcolor=TEXT, fontsize=8, loc="lower right")

    chart: Chart = drawn(title, title, plot, x="step (dots: held-out prompts)", y=y, size=SIZE)
    return chart.svg


def columns(course: Points) -> tuple[list[float], list[float]]:
    """Return steps and values apart."""
    return [step for step, _ in course], [value for _, value in course]
