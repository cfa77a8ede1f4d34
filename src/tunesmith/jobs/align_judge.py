"""Judging the policies of a chain: replies, the judge's scores, and what they say together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tunesmith.engine.checkpoint import checkpoints, load_trainable, step_of
from tunesmith.jobs.align_replies import JudgedPrompt, Said, Writing, held_out_prompts, said_by
from tunesmith.jobs.align_stages import digest
from tunesmith.jobs.data_marks import data_hash
from tunesmith.jobs.result import load_run
from tunesmith.jobs.reward_runs import open_reward_run
from tunesmith.jobs.run_directory import write_json
from tunesmith.json_text import parse_json
from tunesmith.measure.diversity import distinct, self_bleu
from tunesmith.measure.intervals import bootstrap_interval, wilson_interval
from tunesmith.rewards.build import build_reward
from tunesmith.rewards.file import FileReward
from tunesmith.rewards.run import RunReward

if TYPE_CHECKING:
    from tunesmith.jobs.align_spec import JudgedSettings
    from tunesmith.rewards.contract import RewardKind

ELSEWHERE: Final = {"policies", "points", "samples"}
"""Settings of judging that say who is asked and what is shown, and change nobody's replies."""
BASE: Final = "base"
"""Name of the untuned model among the policies."""


@dataclass(frozen=True)
class Policy:
    """One of the models that are judged."""

    name: str
    run: Path
    """Run directory that it is loaded from."""
    tuned: bool = True
    """Whether it is the run's result, or the model that the run started from."""
    step: int | None = None
    """The checkpoint of that step instead of the result."""
    before: tuple[str, ...] = ()
    """Names of the policies that it came from, the base first; they are judged too."""


@dataclass(frozen=True)
class Judging:
    """What is to be judged, and by whom."""

    policies: tuple[Policy, ...]
    """From the base to the final ones, then checkpoints of the last one."""
    judge: tuple[RewardKind, ...]
    settings: JudgedSettings
    folder: Path
    """Gets a file a policy."""


def judge(judging: Judging) -> None:
    """Write the replies of each policy with the judge's scores; what is there already stays."""
    replies = {policy.name: _replies(judging, policy) for policy in judging.policies}
    judged_by = _judged_by(judging.judge)
    missing = [name for name, found in replies.items() if found.get("judged_by") != judged_by]
    if not missing:
        return
    reward = build_reward(judging.judge, open_reward_run)
    for name in missing:
        found = replies[name]
        asked = [JudgedPrompt(tuple(p["messages"]), p["columns"], []) for p in found["prompts"]]
        rows = [one.scored(reply) for one, reply in zip(asked, found["replies"], strict=True)]
        found |= {"rewards": reward(rows), "judged_by": judged_by}
        write_json(judging.folder / f"{name}.json", found)


def _judged_by(judge: Sequence[RewardKind]) -> dict[str, Any]:
    """Return who judges, with the content of what they are read from."""
    files = {
        one.path: Path(one.path, "summary.json") if isinstance(one, RunReward) else Path(one.path)
        for one in judge
        if isinstance(one, RunReward | FileReward)
    }
    return {
        "judge": [one.model_dump(mode="json") for one in judge],
        "files": {path: digest(file) for path, file in files.items()},
    }


def _replies(judging: Judging, policy: Policy) -> dict[str, Any]:
    """Return the replies of a policy, from its file where they were written in the same way."""
    path = judging.folder / f"{policy.name}.json"
    summary = policy.run / "summary.json"
    wanted = {
        "policy": [policy.run.name, policy.tuned, policy.step],
        "of": summary.read_text(encoding="utf-8"),
        "settings": judging.settings.model_dump(mode="json", exclude=ELSEWHERE),
        "data": data_hash(judging.settings.prompts),
    }
    if path.is_file():
        known: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        made = known["made"]
        # Replies of before this was written down, and files that did not move along, say nothing.
        if None in {made.get("data"), wanted["data"]}:
            made = {**made, "data": wanted["data"]}
        if made == wanted:
            return known
    asked, said = _ask(judging, policy)
    found = {
        "made": wanted,
        "prompts": [{"messages": one.messages, "columns": _plain(one.columns)} for one in asked],
        **said._asdict(),
    }
    judging.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    written: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    return written


def _plain(columns: Mapping[str, Any]) -> Any:
    """Return columns as JSON has them: dates and the like, as Parquet has them, are text there."""
    return json.loads(json.dumps(columns, default=str))


def _ask(judging: Judging, policy: Policy) -> tuple[list[JudgedPrompt], Said]:
    settings = judging.settings
    loaded = load_run(policy.run)
    if policy.step is not None:
        found = {step_of(path): path for path in checkpoints(policy.run)}
        saved = load_trainable(found[policy.step])
        # A checkpoint of PPO also holds the value function, which is no part of the policy.
        loaded.tuned.load_state_dict({name: saved[name] for name in loaded.tuned.state_dict()})
    asked = held_out_prompts(settings.prompts, loaded.tokenizer, settings.limit)
    how = Writing(settings.temperature, settings.max_new_tokens, settings.batch_size, settings.seed)
    return asked, said_by(loaded, asked, how, tuned=policy.tuned)


@dataclass(frozen=True)
class Verdict:
    """What is known of one policy."""

    name: str
    step: int | None
    reward: float
    """Mean of the judge's rewards."""
    low: float
    high: float
    """95 % bootstrap interval of that mean over prompts."""
    won: dict[str, float]
    """Share of prompts on which the judge prefers its reply to that of each policy that it came
    from; a tie counts half."""
    kl: float | None
    """Mean over prompts of log p - log q of its replies, in nats a reply, p the policy and q what
    its stage started from; an estimate of their KL divergence, which may fall below 0 by chance."""
    length: float
    """Mean tokens a reply."""
    ended: float
    """Share of replies that ended by themselves."""
    distinct_1: float | None
    distinct_2: float | None
    self_bleu: float
    ahead: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % bootstrap interval of the mean lead in reward over each of those policies. On the same
    prompts: how prompts differ from each other says nothing of who is better."""
    prefers: float | None = None
    """Where the rows are pairs: share of them whose better reply gained more log-probability than
    the worse one since its stage began, which is what preference losses ask for."""
    prefers_low: float | None = None
    prefers_high: float | None = None
    """95 % Wilson interval of that share."""
    likelier: float | None = None
    """Where the rows are pairs: share of them whose better reply is the likelier one, a token."""


def verdicts(judging: Judging) -> list[Verdict]:
    """Return what the files of a judgement say of each policy, in their order."""
    read = {
        policy.name: parse_json((judging.folder / f"{policy.name}.json").read_text("utf-8"))
        for policy in judging.policies
    }
    return [
        verdict_of(p, read[p.name], {name: read[name]["rewards"] for name in p.before})
        for p in judging.policies
    ]


def verdict_of(
    policy: Policy, found: Mapping[str, Any], others: Mapping[str, Sequence[float]]
) -> Verdict:
    """Return what a policy's file says of it, beside the rewards of those that it came from."""
    rewards, replies = found["rewards"], found["replies"]
    interval = bootstrap_interval(rewards)
    divergences = found["divergences"]
    gains, leads = _floats(found.get("gains")), _floats(found.get("leads"))
    low, high = wilson_interval(sum(g > 0 for g in gains), len(gains)) if gains else (None, None)
    return Verdict(
        name=policy.name,
        step=policy.step,
        reward=float(np.mean(rewards)),
        low=interval.low,
        high=interval.high,
        won={name: win_rate(rewards, other) for name, other in others.items()},
        ahead={
            name: bootstrap_interval(np.subtract(rewards, other).tolist())
            for name, other in others.items()
        },
        kl=None if divergences is None else _number(float(np.mean(_floats(divergences)))),
        length=float(np.mean(found["lengths"])),
        ended=float(np.mean(found["ended"])),
        distinct_1=_number(distinct(replies, 1)),
        distinct_2=_number(distinct(replies, 2)),
        self_bleu=self_bleu(replies),
        prefers=share_above_zero(gains) if gains else None,
        prefers_low=low,
        prefers_high=high,
        likelier=share_above_zero(leads) if leads else None,
    )


def win_rate(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the share of places at which `one` is larger; an equal one counts half."""
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(one, other, strict=True)]
    return sum(points) / len(points)


def share_above_zero(values: Sequence[float]) -> float:
    """Return the share of values above 0; a 0 counts half."""
    return win_rate(values, [0.0] * len(values))


def side_by_side(judging: Judging, count: int) -> list[dict[str, Any]]:
    """Return the first prompts with what each policy replied, checkpoints left out."""
    whole = [policy.name for policy in judging.policies if policy.step is None]
    read = {
        name: parse_json((judging.folder / f"{name}.json").read_text("utf-8")) for name in whole
    }
    prompts = read[whole[0]]["prompts"][:count]
    return [
        {
            "prompt": "\n\n".join(str(turn["content"]) for turn in prompt["messages"]),
            "replies": [
                {"policy": n, "reply": read[n]["replies"][at], "reward": read[n]["rewards"][at]}
                for n in whole
            ],
        }
        for at, prompt in enumerate(prompts)
    ]


def as_json(found: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return verdicts as JSON holds them."""
    return [asdict(verdict) for verdict in found]


def _floats(values: Sequence[float | None] | None) -> list[float]:
    """Return numbers of a file, NaN for those that were not finite; empty where there are none."""
    return [math.nan if value is None else value for value in values or []]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
