"""What a run directory, or that of a chain of alignment, says: kept small, for results to quote."""

import json
from pathlib import Path
from typing import Any

import yaml

from alignment_stopped import held_out, last_samples, spans, stopped_facts, whole
from tunesmith.jobs.align_spec import load_alignment
from tunesmith.jobs.moved import Move
from tunesmith.measure.intervals import bootstrap_interval, wilson_interval
from tunesmith.report.record import Record, read_record
from tunesmith.spec import load_run_file

SAMPLES = 4
TEXT = 600
"""Characters of a sample's text that are kept."""
PAIRS = Path(__file__).resolve().parents[2] / "shared" / "data" / "llms_from_scratch"
"""Where the rows of polite and rude replies lie, as the examples expect them."""
POINTS = 60
"""Roll-outs that are kept of a run's course."""
OF_SUMMARY = (
    *("model", "method", "objective", "steps", "seconds", "wall_seconds", "before", "after"),
    *("intervals", "general_loss", "peak_memory_bytes", "trainable_parameters"),
)
OF_EVENT = ("step", "reward", "rewards", "length", "ended")


def facts_of(directory: Path) -> dict[str, Any]:
    """Return the facts of a run, or of a chain with all its stages; empty where nothing ran."""
    if (directory / "align.yaml").is_file():
        return chain_facts(directory)
    return run_facts(directory) if directory.is_dir() else {}


def chain_facts(directory: Path) -> dict[str, Any]:
    """Return the facts of a chain: of those stages that ran, and its judgement where it has one."""
    asked = yaml.safe_load((directory / "align.yaml").read_text(encoding="utf-8"))
    stages = {stage["name"]: directory / stage["name"] for stage in asked["stages"]}
    facts = {name: run_facts(path) for name, path in stages.items() if path.is_dir()}
    ran = {name: fact for name, fact in facts.items() if fact}
    if not ran:
        return {}
    chain = directory / "alignment.json"
    found = json.loads(chain.read_text(encoding="utf-8")) if chain.is_file() else {}
    return {
        "prompts": found.get("prompts"),
        "verdicts": [v | judged(directory, v) for v in found.get("verdicts", [])],
        "samples": [cut(sample) for sample in found.get("samples", [])[:SAMPLES]],
        "stages": {name: fact | kinds_of(stages[name], fact) for name, fact in ran.items()},
        "not_run": [name for name in stages if name not in ran],
    }


def changed(directory: Path, example: Path) -> list[str]:
    """Return the settings of a run or a chain that are not those of its example, as typed."""
    chain = (directory / "align.yaml").is_file()
    file = directory / ("align.yaml" if chain else "run.yaml")
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    asked = load_alignment(example) if chain else load_run_file(example).resolved()
    example_of = yaml.safe_load(asked.to_yaml())
    theirs = flat(example_of)
    place = Path(theirs["output"]).absolute()
    move = Move.between(place, Path(own.get("output", place)).absolute())
    return [
        f"{key}={value}"
        for key, value in flat(own).items()
        if value not in (theirs.get(key), move.of(theirs.get(key)))
        and key not in {"name", "output"}
    ] + emptied(own, example_of)


def emptied(own: Any, theirs: Any, key: str = "") -> list[str]:
    """Return the lists of `theirs` that `own` has nothing in, as typed."""
    if isinstance(theirs, list) and theirs and not own:
        return [f"{key}=[]"]
    found = []
    if isinstance(theirs, dict | list):
        for name, inner in theirs.items() if isinstance(theirs, dict) else enumerate(theirs):
            mine = dict(own.items() if isinstance(own, dict) else enumerate(own or [])).get(name)
            found += emptied(mine, inner, f"{key}.{name}" if key else str(name))
    return found


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by their dotted keys."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    leaves: dict[str, Any] = {}
    for name, inner in inside:
        place = f"{key}.{name}" if key else str(name)
        leaves |= flat(inner, place) if isinstance(inner, dict | list) else {place: inner}
    return leaves


def kinds_of(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return right and all of the held-out replies by kind, of a classifier of polite and rude.

    Its rows are all chosen replies and then all rejected ones of the same pairs. Of each pair one
    is the plain reply of the row (`output`), the other a rewriting of it.
    """
    path = directory / "outcomes.json"
    asked = yaml.safe_load((directory / "run.yaml").read_text(encoding="utf-8"))
    sources = asked["data"]["evaluation"]
    prompts = [source.get("prompt") for source in sources]
    if facts["objective"] != "classification" or prompts != ["{chosen}", "{rejected}"]:
        return {}
    pairs = PAIRS / Path(sources[0]["path"]).name
    if not (path.is_file() and pairs.is_file()):
        return {}
    right = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
    rows = json.loads(pairs.read_text(encoding="utf-8"))[sources[0]["skip"] :]
    if len(right) != 2 * len(rows):
        return {}
    replies = [("polite", row, row["chosen"]) for row in rows]
    replies += [("rude", row, row["rejected"]) for row in rows]
    found: dict[str, list[int]] = {}
    for (kind, row, reply), outcome in zip(replies, right, strict=True):
        count = found.setdefault("plain" if reply == row["output"] else kind, [0, 0])
        count[0] += int(outcome)
        count[1] += 1
    return {"kinds": found}


def judged(directory: Path, verdict: dict[str, Any]) -> dict[str, Any]:
    """Return how many replies of a policy the judge gives more than a half, and what pairs gained.

    The first is what a classifier would call them; of a reward model, whose scores have no such
    middle, it means nothing and the table leaves it out.
    """
    path = directory / "judged" / f"{verdict['name']}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    rewards = found["rewards"]
    above = sum(reward > 0.5 for reward in rewards)
    return {
        "above_half": above / len(rewards),
        "above_half_interval": share(above, len(rewards)),
        "gained": gained(found),
    }


def gained(found: dict[str, Any]) -> dict[str, list[int]]:
    """Return how many pairs' better replies gained more, and of how many, by what the pairs are.

    Of each pair one is the plain reply of the row (`output`), the other a rewriting of it.
    """
    counts: dict[str, list[int]] = {}
    for prompt, gain in zip(found["prompts"], found.get("gains") or [], strict=False):
        columns = prompt["columns"]
        if columns.get("output") in {columns.get("chosen"), columns.get("rejected")}:
            plain = columns["chosen"] == columns["output"]
            count = counts.setdefault("plain to rude" if plain else "polite to plain", [0, 0])
            count[0] += gain > 0
            count[1] += 1
    return counts


def share(count: int, of: int) -> list[float]:
    """Return the 95 % interval of a share."""
    return list(wilson_interval(count, of))


def run_facts(directory: Path) -> dict[str, Any]:
    """Return the facts of one run, of its way so far where it did not end; empty without a step."""
    record = read_record(directory)
    summary, run = record.summary, yaml.safe_load(record.run_file or "{}")
    own = {key: summary[key] for key in OF_SUMMARY if key in summary}
    if not (own := own or stopped_facts(record, run)):
        return {}
    hardware = (summary or record.environment)["hardware"]
    return {
        **own,
        "seed": run.get("seed"),
        "learning_rate": run.get("train", {}).get("learning_rate"),
        "data": [Path(source["path"]).name for source in run.get("data", {}).get("train", [])],
        "device": next(iter(hardware["cuda_devices"]), None) or processor(hardware),
        "ran": [[round(start), round(end)] for start, end in spans(record.events)],
        "versions": record.environment.get("versions", {}),
        "evaluations": {name: latest(pts) for name, pts in record.evaluations().items()},
        "course": course(record),
        "roll_outs": roll_outs(record),
        "samples": [
            cut(sample)
            for sample in (record.samples if summary else last_samples(record))[:SAMPLES]
        ],
        **of_pairs(directory / "outcomes.json"),
        **of_prompts(directory / "outcomes.json", own, run, record),
    }


def of_pairs(path: Path) -> dict[str, int]:
    """Return of how many held-out pairs the better one was looked for, where there are pairs."""
    outcomes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    right = outcomes.get("reward_accuracy")
    return {} if right is None else {"held_out_pairs": len(right)}


def of_prompts(
    path: Path, facts: dict[str, Any], run: dict[str, Any], record: Record
) -> dict[str, Any]:
    """Return over how many held-out prompts the rewards are means, and the means' intervals.

    Rewards of 0 and 1 are counted, before as after; of all others the single rewards of the
    finished run are needed.
    """
    if facts["objective"] not in {"ppo", "grpo"}:
        return {}
    evaluations = [event["metrics"] for event in record.of_kind("evaluated")]
    if path.is_file():
        outcomes = json.loads(path.read_text(encoding="utf-8"))
        count = len(outcomes["reward"])
    else:
        outcomes, count = {}, held_out(run, evaluations)
    if count is None:
        return {}
    found: dict[str, Any] = {"held_out_prompts": count}
    found["reward_intervals"] = {
        name: list(bootstrap_interval(values))
        for name, values in outcomes.items()
        if name.startswith("reward_")
    }
    counted = set(outcomes.get("reward", [])) <= {0.0, 1.0}
    if counted and all(whole(metrics["reward"] * count) for metrics in evaluations):
        found["right_of"] = count
    elif outcomes:
        found["reward_interval"] = list(bootstrap_interval(outcomes["reward"]))
    return found


def processor(hardware: dict[str, Any]) -> str:
    """Return what computes where there is no GPU."""
    cores = f" with {hardware['cores']} cores" if "cores" in hardware else ""
    return f"{hardware['processor']}{cores}"


def latest(points: list[tuple[int, float]]) -> list[list[float]]:
    """Return one value a step, the last one: a run that went on evaluates some of them again."""
    return [[step, value] for step, value in dict(points).items()]


def course(record: Record) -> list[dict[str, Any]]:
    """Return what the roll-outs were worth on the way, thinned out, the last one kept."""
    events = list({event["step"]: event for event in record.of_kind("gathered")}.values())
    every = max(1, -(-len(events) // POINTS))
    kept = [e for number, e in enumerate(events) if number % every == 0 or e is events[-1]]
    return [
        {key: rounded(e[key]) for key in OF_EVENT} | {"kl": rounded(e["measured"].get("kl"))}
        for e in kept
    ]


def roll_outs(record: Record) -> list[dict[str, Any]]:
    """Return replies of the first and of the last roll-out, with their rewards' deviation."""
    events = record.of_kind("gathered")
    return [
        {
            "step": event["step"],
            "reward_std": rounded(event["reward_std"]),
            "samples": [cut(sample) for sample in event["samples"][:SAMPLES]],
        }
        for event in (*events[:1], *events[1:][-1:])
    ]


def rounded(value: Any) -> Any:
    """Return numbers with five digits, which is more than any table shows."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def cut(value: Any) -> Any:
    """Return a sample with its texts cut to what a page shows."""
    if isinstance(value, dict):
        return {key: cut(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [cut(inner) for inner in value]
    return value[:TEXT] if isinstance(value, str) else rounded(value)
