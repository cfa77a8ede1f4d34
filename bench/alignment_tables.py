"""Tables of what the demonstrations of alignment came to, out of alignment.json."""

import math
import statistics
from collections.abc import Callable

from alignment_chains import findings, judge_alone, policies, preferences, replies, stages
from alignment_pairs import best_of_pairs, more_pairs
from alignment_pictures import GRPO_REWARD, JUDGE, OVER, PPO_KL, PPO_REWARD, judge, of_objective
from alignment_words import (
    MISSING,
    Found,
    command,
    counted,
    every_run,
    interval,
    minutes,
    number,
    percent,
    reached,
    samples_of,
    side_by_side,
    stops,
    table,
)

REWARD_MODELS = {"reward-harmless": "hh_rlhf_harmless", "reward-ultrafeedback": "UltraFeedback"}
"""Demonstrations of reward models, with the name of their data."""
ON_A_CPU = "ppo-sentiment-cpu"
"""A small variant of the demonstration of PPO."""
TARGET = 0.85
"""Reward by the held-out judge that PPO is to reach."""


def tables(found: Found) -> dict[str, str]:
    """Return the content of every slot of the pages, by its name."""
    makers: dict[str, tuple[str, Callable[[Found], str]]] = {
        "preferences": ("polite-preferences", lambda one: preferences(found, one)),
        "judge-alone": ("polite-preferences", judge_alone),
        "ppo": ("ppo-sentiment", lambda one: ppo(found, one)),
        "ppo-samples": ("ppo-sentiment", lambda one: samples_of(one["stages"]["ppo-0"])),
        "grpo": ("grpo-arithmetic", lambda one: grpo(found, one)),
        "rlhf-stages": ("rlhf-politeness", lambda one: stages(found, one)),
        "rlhf-policies": ("rlhf-politeness", policies),
        "rlhf-findings": ("rlhf-politeness", findings),
        "rlhf-picture": ("rlhf-politeness", over_optimisation),
        "rlhf-samples": ("rlhf-politeness", replies),
        "distilled": ("distillation", lambda one: stages(found, one)),
    }
    made = {
        slot: make(one) if (one := furthest(found, file)) else MISSING
        for slot, (file, make) in makers.items()
    }
    longer = found.get("polite-preferences-long")
    return made | {
        "rewards": rewards(found),
        "more-pairs": more_pairs(found),
        "preferences-long": preferences(found, longer) if longer else MISSING,
    }


def furthest(found: Found, file: str) -> Found | None:
    """Return a demonstration, or that variant of it which alone was judged."""
    own = [one for name, one in sorted(found.items()) if one["file"] == file]
    return max(own, key=lambda one: len(one.get("verdicts", [])), default=None)


def page(found: Found) -> str:
    """Return bench/results/alignment.md."""
    made = tables(found)
    parts = [
        ("Reward models", ["rewards"]),
        ("Preference losses", ["preferences", "judge-alone", "preferences-long", "more-pairs"]),
        ("PPO", ["ppo", "ppo-samples"]),
        ("GRPO", ["grpo"]),
        ("Distillation", ["distilled"]),
        ("The whole chain", ["rlhf-stages", "rlhf-policies", "rlhf-findings", "rlhf-samples"]),
    ]
    lines = ["# Alignment, measured", "", "Written by bench/alignment.py from the runs themselves."]
    for title, slots in parts:
        contents = dict.fromkeys(made[slot] for slot in slots)
        lines += ["", f"## {title}", "", "\n\n".join(contents)]
    text = "\n".join(lines) + "\n"
    return text.replace("](", "](../../docs/")


def rewards(found: Found) -> str:
    """Return the reward models beside always preferring the longer reply."""
    names = [name for name in REWARD_MODELS if name in found and "intervals" in found[name]]
    if not names:
        return MISSING
    rows = []
    for name in names:
        after = found[name]["after"]
        rows.append(
            [
                f"`{name}`",
                percent(after["accuracy"], found[name]["intervals"]["accuracy"]),
                percent(after["length_only_accuracy"]),
                number(after["calibration_error"]),
                number(after["length_correlation"]),
                minutes(found[name]["seconds"]),
            ]
        )
    head = (
        *("run", "held-out pairs ranked right (95 % interval)", "by length alone"),
        *("calibration error", "correlation with length", "training"),
    )
    how = " ".join(command(found[name], found[name]) for name in names)
    missing = "".join(
        f" `tunesmith train examples/{name}.yaml`: not measured yet."
        for name in REWARD_MODELS
        if name not in names
    )
    beside = side_by_side(found, [found[n] for n in names])
    doubts = "".join(unproved(name, found[name]) for name in names)
    return f"{table(head, rows)}\n\n{doubts}{how}{missing}{beside}"


def unproved(name: str, run: Found) -> str:
    """Return what to say of a reward model that its rows do not tell from the rule of length."""
    if beats_length(run):
        return ""
    length = percent(run["after"]["length_only_accuracy"])
    return (
        f"`{name}` as it was run is not told from length alone: {length} lies in its "
        f"interval after {run['steps']} steps. "
    )


def beats_length(run: Found) -> bool:
    """Return whether the whole interval of a reward model lies above the rule of length."""
    low, _ = run["intervals"]["accuracy"]
    return bool(low > run["after"]["length_only_accuracy"])


def ppo(found: Found, one: Found) -> str:
    """Return PPO's seeds before the classifier that rewarded them and the one that did not."""
    runs = of_objective(found, "ppo-sentiment", "ppo")
    small = of_objective(found, ON_A_CPU, "ppo")
    runs |= {f"{name} ({run['device']})": run for name, run in small.items()}
    rows = [
        [
            name,
            reached(run),
            f"{number(run['before'].get(JUDGE))} to **{number(run['after'].get(JUDGE))}** "
            + interval(run.get("reward_intervals", {}).get(JUDGE)),
            f"{number(run['before'].get('reward'))} to {number(run['after'].get('reward'))}",
            number(run["after"].get("kl")),
            number(run["after"].get("length"), ".1f"),
            rise(run),
            target(run),
            minutes(run["seconds"]),
        ]
        for name, run in runs.items()
    ]
    head = (
        *("run", "step", "held-out judge, before and there", "the reward itself"),
        *("KL (nats a reply)", "tokens a reply", "perplexity of general text"),
        *(f"roll-outs at {TARGET:g} by the judge", "time to that step"),
    )
    seeds = seeds_of_ppo(found)
    after = [run["after"][JUDGE] for run in seeds]
    spread = f" ± {statistics.stdev(after):.2g} (deviation over seeds)" if len(after) > 1 else ""
    kinds = [one["stages"][name]["after"]["accuracy"] for name in ("classifier", "judge")]
    single = any(JUDGE not in run.get("reward_intervals", {}) for run in seeds)
    unknown = any(run.get("general_loss") is None for run in seeds)
    own = "".join(
        f" On a CPU: {command(other, other['stages']['ppo'])}"
        for other in found.values()
        if other["file"] == ON_A_CPU and "ppo" in other["stages"]
    )
    how = (
        f"{command(one, seeds[0])} Mean of the judge over seeds ({len(after)}): "
        f"{statistics.mean(after):.3g}{spread}, on "
        f"{seeds[0].get('held_out_prompts', 'the same')} beginnings of sentences that "
        "neither policy nor classifiers were trained on. The classifiers' accuracies there: "
        f"{percent(kinds[0])} (reward) and {percent(kinds[1])} (judge).{stops(runs)}"
        + " No interval within a seed: single rewards are written at a run's end." * single
        + " Perplexity of general text is measured at a run's end too: not measured." * unknown
        + own
        + side_by_side(found, list(runs.values()))
    )
    shown = f"![Held-out judge's reward over steps]({PPO_REWARD})\n\n![KL over steps]({PPO_KL})"
    return f"{table(head, rows)}\n\n{how}\n\n{shown}"


def target(run: Found) -> str:
    """Return from which step on the roll-outs reached the target, and with which KL."""
    kls = {event["step"]: event["kl"] for event in run["course"]}
    for step, reward in judge(run):
        if reward >= TARGET:
            return f"step {step} (KL {number(kls[step])})"
    return "not reached"


def rise(run: Found) -> str:
    """Return by how much perplexity on general text rose."""
    loss = run.get("general_loss")
    if loss is None:
        return "not measured"
    return f"{math.exp(loss['after'] - loss['before']) - 1:+.1%}"


def grpo(found: Found, one: Found) -> str:
    """Return the accuracy on held-out problems before, on the way and after."""
    runs = of_objective(found, "grpo-arithmetic", "grpo")
    head = (
        *("run", "held-out problems", "step", "answered right (95 % interval)"),
        *("KL (nats a reply)", "tokens a reply"),
    )
    rows = []
    for name, run in runs.items():
        of = run.get("right_of")
        kls, lengths = (dict(run["evaluations"].get(key, [])) for key in ("kl", "length"))
        rows += [
            [
                *(name, number(run.get("held_out_prompts"), "d"), str(step), counted(value, of)),
                *(number(kls.get(step)), number(lengths.get(step), ".1f")),
            ]
            for step, value in run["evaluations"]["reward"]
        ]
    gains = "; ".join(
        f"{name}: {100 * (run['after']['reward'] - run['before']['reward']):+.0f} points by step "
        f"{run['steps']}, {minutes(run['seconds'])} after the start"
        for name, run in runs.items()
        if run["before"]
    )
    how = (
        f"`{one['command']}`, with the numbers and the learning rate that each row says, on one "
        f"{one['device']}. Each problem was answered once at temperature 1. {gains}."
        f"{stops(runs)}{side_by_side(found, list(runs.values()))}"
    )
    shown = f"![Share of right answers over steps]({GRPO_REWARD})"
    hardest = max(runs.values(), key=lambda run: run.get("held_out_prompts") or 0)
    return f"{table(head, rows)}\n\n{how}\n\n{shown}\n\n{samples_of(hardest)}"


def over_optimisation(one: Found) -> str:
    """Return the link to the picture of the judge's reward against KL."""
    if not [v for v in one["verdicts"] if v["step"] is not None]:
        return "Not measured: no checkpoint on the way was judged."
    return f"![The judge's reward against KL]({OVER})"


def in_readme(found: Found) -> str:
    """Return what README says of alignment, in a few lines."""
    said = [*reward_lines(found), *grpo_lines(found), *ppo_lines(found), *chain_lines(found)]
    if not said:
        return MISSING
    pairs = preference_lines(found)
    runs = [run for run in every_run(found) if run["objective"] in {"reward", "ppo", "grpo"}]
    stopped = sum("stopped" in run for run in runs)
    lines = ["SmolLM2-135M-Instruct with LoRA:", "", *said]
    if stopped:
        lines += [
            "",
            f"{stopped} of {len(runs)} such runs were stopped before their end; the numbers are "
            "those of their last evaluation.",
        ]
    if pairs:
        lines += ["", *pairs]
    if unmeasured := missing(found):
        lines += ["", f"Not measured yet: {', '.join(unmeasured)}."]
    return "\n".join(lines)


def reward_lines(found: Found) -> list[str]:
    """Return a line for each reward model."""
    return [
        f"- a reward model on {label} ranks {percent(after['accuracy'], ends)} of held-out "
        f"pairs right, length alone {percent(after['length_only_accuracy'])}"
        f"{'' if beats_length(found[name]) else ', from which it is not told'}"
        f"{where(found[name])}{smaller(found[name])}"
        for name, label in REWARD_MODELS.items()
        if name in found and "intervals" in found[name]
        for after, ends in [(found[name]["after"], found[name]["intervals"]["accuracy"])]
    ]


def preference_lines(found: Found) -> list[str]:
    """Return a line for each loss of pairs that was judged, and on what."""
    one = furthest(found, "polite-preferences")
    verdicts = [v for v in (one or {}).get("verdicts", []) if v["name"] in one["stages"]]
    if not verdicts:
        return []
    run = one["stages"][verdicts[0]["name"]]
    lines = [f"Losses of pairs, polite replies against rude ones, on one {run['device']}:", ""]
    for verdict in verdicts:
        polite = (
            "own replies judged polite "
            f"{percent(verdict['above_half'], verdict['above_half_interval'])}"
        )
        prefers = ""
        if verdict["prefers"] is not None:
            ends = (verdict["prefers_low"], verdict["prefers_high"])
            prefers = f"prefers {percent(verdict['prefers'], ends)} of held-out better replies; "
        lines.append(f"- {verdict['name']}: {prefers}{polite}")
    return lines + best_of_pairs(found)


def grpo_lines(found: Found) -> list[str]:
    """Return a line for each run of GRPO."""
    return [
        f"- GRPO on sums and differences ({name}): "
        f"{counted(run['before'].get('reward'), run.get('right_of'))} to "
        f"{counted(run['after'].get('reward'), run.get('right_of'))} of held-out problems right "
        f"at step {run['steps']}, after {minutes(run['seconds'])}{where(run)}"
        for name, run in of_objective(found, "grpo-arithmetic", "grpo").items()
    ]


def ppo_lines(found: Found) -> list[str]:
    """Return a line for the seeds of PPO."""
    lines = []
    for file in ("ppo-sentiment", ON_A_CPU):
        if not (runs := seeds_of_ppo(found, file)):
            continue
        before, after, kl = (
            statistics.mean(run[when][key] for run in runs)
            for when, key in (("before", JUDGE), ("after", JUDGE), ("after", "kl"))
        )
        cost = "; ".join(rise(run) for run in runs if run.get("general_loss") is not None)
        lines.append(
            f"- PPO for positive sentiment, {len(runs)} seed{'s' * (len(runs) != 1)}: "
            f"{before:.2f} to {after:.2f} by a classifier that did not teach, "
            f"KL {kl:.1f} nats a reply, at step {runs[0]['steps']}"
            + (f", perplexity of general text {cost}" if cost else "")
            + where(runs[0])
        )
    return lines


def chain_lines(found: Found) -> list[str]:
    """Return a line for the whole chain, if its policies were judged."""
    one = furthest(found, "rlhf-politeness") or {}
    verdicts = {v["name"]: v for v in one.get("verdicts", []) if v["step"] is None}
    if not {"sft", "ppo"} <= verdicts.keys():
        return []
    before, after = verdicts["sft"], verdicts["ppo"]
    return [
        f"- SFT, a reward model, PPO: a judge that no stage learns from prefers PPO's reply to "
        f"SFT's on {percent(after['won']['sft'])} of {one['prompts']} held-out prompts, mean "
        f"reward {number(before['reward'])} to {number(after['reward'])}, KL "
        f"{number(after['kl'])} nats a reply{where(one['stages']['ppo'])}{smaller(one)}"
    ]


def where(run: Found) -> str:
    """Return what a run ran on, as the end of a line."""
    return f" (one {run['device']})"


def smaller(one: Found) -> str:
    """Return the settings of a run that are not those of its example."""
    changed = one.get("changed", [])
    return f", with {' '.join(f'`{setting}`' for setting in changed)}" if changed else ""


def seeds_of_ppo(found: Found, file: str = "ppo-sentiment") -> list[Found]:
    """Return the runs of PPO with the settings of the example."""
    stages = found.get(file, {}).get("stages", {})
    return [run for run in stages.values() if run["objective"] == "ppo"]


def missing(found: Found) -> list[str]:
    """Return what the demonstrations ask for and nothing has measured."""
    names = [f"`{name}`" for name in REWARD_MODELS if name not in found]
    if not (furthest(found, "polite-preferences") or {}).get("verdicts"):
        names.append("the losses of pairs (`polite-preferences`)")
    if not (furthest(found, "rlhf-politeness") or {}).get("verdicts"):
        names.append("the judgement of the chain `rlhf-politeness`")
    ppo_runs = [run for file in ("ppo-sentiment", ON_A_CPU) for run in seeds_of_ppo(found, file)]
    if all(run.get("general_loss") is None for run in ppo_runs):
        names.append("what PPO costs in perplexity")
    return names
