"""Tables of chains of alignment: stages, policies before their judge, replies side by side."""

from alignment_words import (
    Found,
    command,
    counted,
    interval,
    minutes,
    number,
    percent,
    quoted,
    reached,
    samples_of,
    side_by_side,
    stops,
    table,
)
from tunesmith.report.alignment import sentences

MOST_TELLING = {
    "sft": ("loss", "token_accuracy", "perplexity"),
    "distillation": ("divergence",),
    "reward": ("accuracy", "length_only_accuracy", "calibration_error"),
    "classification": ("accuracy",),
    "dpo": ("loss", "reward_accuracy", "signed_reward"),
    "ppo": ("reward", "kl", "length", "ended"),
    "grpo": ("reward", "kl", "length", "ended"),
}
"""Metrics that a line about a stage has room for, by objective."""
PAIRS = ("polite to plain", "plain to rude")
"""Kinds of pairs, the better reply first."""
UNJUDGED = "Not measured: the chain was stopped before its policies were judged."


def preferences(found: Found, one: Found) -> str:
    """Return all preference losses before the same judge, or the stages that there are."""
    if not one["verdicts"]:
        return f"{stages(found, one)}\n\n{UNJUDGED}"
    rows = [
        [
            v["name"],
            percent(v["prefers"], (v["prefers_low"], v["prefers_high"]))
            if v["prefers"] is not None
            else "-",
            *(gained(v, kind) for kind in PAIRS),
            percent(v["likelier"]),
            percent(v["above_half"], v["above_half_interval"]),
            percent(v["won"].get("sft")),
            number(v["kl"]),
            number(v["length"], ".1f"),
            number(v["distinct_2"]),
            number(v["self_bleu"], ".1f"),
            minutes(one["stages"][v["name"]]["seconds"]) if v["name"] in one["stages"] else "-",
        ]
        for v in one["verdicts"]
    ]
    head = (
        *("policy", "prefers the better reply (95 % interval)", *PAIRS),
        "better reply likelier a token",
        *("own replies judged polite (95 % interval)", "wins against sft", "KL (nats a reply)"),
        *("tokens a reply", "distinct-2", "self-BLEU", "training"),
    )
    how = (
        f"{command(one, one['stages']['sft'])} All on {one['prompts']} rows that nothing was "
        "trained on. A policy prefers a reply whose log-probability rose more since its stage "
        "began; the next two columns tell the pairs apart."
        + side_by_side(found, list(one["stages"].values()))
    )
    return f"{table(head, rows)}\n\n{how}"


def gained(verdict: Found, kind: str) -> str:
    """Return of how many pairs of a kind the better reply gained more."""
    right, of = verdict.get("gained", {}).get(kind, (0, 0))
    return percent(right / of) if of else "-"


def judge_alone(one: Found) -> str:
    """Return how far the classifier that judges can be trusted, by kind of reply."""
    judge = one["stages"].get("judge")
    if judge is None or "kinds" not in judge:
        return "The judge by kind of reply: not measured."
    said = ", ".join(
        f"{counted(right / of, of)} of {of} {kind} replies"
        for kind, (right, of) in judge["kinds"].items()
    )
    return (
        f"The judge agrees with {percent(judge['after']['accuracy'])} of the held-out labels: "
        f"{said}. A plain reply is the chosen one of its pair in about half of the rows and the "
        "rejected one in the others, so no classifier of single replies can agree with more than "
        "about three quarters of the labels, and what counts are the rewritten ones."
    )


def stages(found: Found, one: Found) -> str:
    """Return what each stage of a chain did, and which did not run."""
    rows = []
    for name, run in one["stages"].items():
        both = [k for k in MOST_TELLING[run["objective"]] if k in run["after"]]
        told = "; ".join(
            f"{k.replace('_', ' ')} {number(run['before'].get(k))} to {number(run['after'][k])}"
            for k in both
        )
        rows.append([name, run["objective"], reached(run), minutes(run["seconds"]), told])
    head = ("stage", "objective", "step", "time to it", "held-out rows, before and there")
    runs = one["stages"]
    missing = one.get("not_run", [])
    how = (
        command(one, next(iter(runs.values())))
        + (f" Did not run: {', '.join(missing)}." if missing else "")
        + stops(runs)
        + side_by_side(found, list(runs.values()))
    )
    return f"{table(head, rows)}\n\n{how}"


def policies(one: Found) -> str:
    """Return the policies of a chain before its judge."""
    if not one["verdicts"]:
        return UNJUDGED
    rows = [
        [
            v["name"],
            f"{number(v['reward'])} {interval((v['low'], v['high']))}",
            ", ".join(f"{won:.0%} against {name}" for name, won in v["won"].items()) or "-",
            number(v["kl"]),
            number(v["length"], ".1f"),
            percent(v["ended"]),
            number(v["distinct_2"]),
            number(v["self_bleu"], ".1f"),
        ]
        for v in one["verdicts"]
    ]
    head = (
        *("policy", "judge's reward (95 % interval)", "wins", "KL (nats a reply)"),
        *("tokens a reply", "ended", "distinct-2", "self-BLEU"),
    )
    return f"{table(head, rows)}\n\nJudged on {one['prompts']} held-out prompts."


def findings(one: Found) -> str:
    """Return what the report says in words; without a judgement, how the roll-outs went."""
    if one["verdicts"]:
        return "\n".join(f"- {sentence}" for sentence in sentences(one["verdicts"]))
    return "\n".join(way(one, name) for name, run in one["stages"].items() if run["course"])


def way(one: Found, name: str) -> str:
    """Return how the roll-outs of a stage went, and how far their rewards lay from each other."""
    run, written = one["stages"][name], one["stages"].get("reward", {}).get("after", {})
    first, last = run["course"][0], run["course"][-1]
    spread = " and ".join(number(rolled["reward_std"]) for rolled in run["roll_outs"])
    people = (
        f", those of the written replies of held-out rows by {number(written['reward_std'])}"
        if "reward_std" in written
        else ""
    )
    return (
        f"- {name}: reward {number(first['reward'])} in the first roll-out and "
        f"{number(last['reward'])} in the last (step {last['step']}), KL {number(first['kl'])} and "
        f"{number(last['kl'])} nats, {first['length']:.1f} and {last['length']:.1f} tokens a "
        f"reply, {percent(first['ended'])} and {percent(last['ended'])} ended.\n"
        f"- {name}: the rewards of a roll-out's replies differ by {spread} (standard deviation, "
        f"first and last roll-out){people}."
    )


def replies(one: Found) -> str:
    """Return replies of all policies to the same prompts, or those of each stage."""
    if not one["samples"]:
        return "\n\n".join(
            part
            for name, run in one["stages"].items()
            if run["samples"]
            for part in (f"Stage {name}:", samples_of(run), rolled_out(run))
            if part
        )
    return "\n\n".join(
        "\n".join(
            [
                f"> {quoted(sample['prompt'])}",
                "",
                *(f"- {r['policy']}: {quoted(r['reply'])}" for r in sample["replies"]),
            ]
        )
        for sample in one["samples"]
    )


def rolled_out(run: Found) -> str:
    """Return replies of the first and the last roll-out with their rewards."""
    rows = [
        [str(rolled["step"]), quoted(s["prompt"]), quoted(s["reply"]), number(s["reward"])]
        for rolled in run["roll_outs"]
        for s in rolled["samples"]
    ]
    head = ("roll-out of step", "prompt", "reply", "reward")
    return table(head, rows) if rows else ""
