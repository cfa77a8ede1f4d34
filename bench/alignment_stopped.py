"""What a run that did not come to its end left in metrics.jsonl, in the words of a summary."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunesmith.data.problems import generated_file, is_generated
from tunesmith.report.record import Record

Event = dict[str, Any]


def stopped_facts(record: Record, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a run up to its last evaluation, and where it stopped.

    `steps`, `after` and `seconds` are those of that evaluation; `stopped` has the step that was
    reached, those asked for, and whether the run could still say so. Empty if there was no step.
    """
    steps = [event["step"] for event in record.of_kind("step_done")]
    if not steps:
        return {}
    evaluations, starts = record.of_kind("evaluated"), record.of_kind("run_started")
    begun = {"before": {}, "after": {}, "steps": 0, "seconds": 0.0}
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        begun["before"] = first["metrics"] if first["step"] == 0 else {}
        begun |= {"after": last["metrics"], "steps": last["step"]}
        begun["seconds"] = seconds_until(record.events, last)
    method = run["method"]
    told = record.events[-1]["event"] == "run_finished"
    return {
        "model": run["model"]["name"],
        "method": method["name"] if isinstance(method, dict) else [one["name"] for one in method],
        "objective": run["objective"]["name"],
        **begun,
        "peak_memory_bytes": max(e["memory_bytes"] or 0 for e in record.of_kind("step_done")),
        "trainable_parameters": starts[-1]["trainable_parameters"],
        "stopped": {
            "at": max(steps),
            "of": starts[-1]["total"],
            "how": "interrupted" if told else "killed",
        },
    }


def seconds_until(events: Sequence[Event], last: Event) -> float:
    """Return how long a run was training and evaluating up to an event, pauses left out."""
    until = next(number for number, event in enumerate(events) if event is last)
    return sum(end - start for start, end in spans(events[: until + 1]))


def spans(events: Sequence[Event]) -> list[tuple[float, float]]:
    """Return when a run began and ended, once more for each time that it was taken up again."""
    found: list[tuple[float, float]] = []
    for event in events:
        if event["event"] == "run_started":
            found.append((event["time"], event["time"]))
        elif found:
            found[-1] = (found[-1][0], event["time"])
    return found


def last_samples(record: Record) -> list[dict[str, Any]]:
    """Return the replies before, and those of the last evaluation of a run without an end."""
    events = record.of_kind("sampled")
    later = {e["prompt"]: e["reply"] for e in events if e["step"]}
    return [sample | {"after": later.get(sample["prompt"])} for sample in record.samples]


def held_out(run: Mapping[str, Any], evaluations: Sequence[Mapping[str, float]]) -> int | None:
    """Return how many prompts the evaluations are means over; None where nothing proves it.

    A generator says how many problems it has. Elsewhere evaluation.limit is the number if there
    are as many rows, which the share of ended replies, a count over it, must then agree with.
    """
    limit = run["evaluation"]["limit"]
    count = min([*generated(run["data"]["evaluation"]), *([limit] if limit else [])], default=0)
    shares = [metrics["ended"] for metrics in evaluations]
    return count if count and all(whole(share * count) for share in shares) else None


def generated(sources: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Yield the number of generated problems, where all sources are generated."""
    if sources and all(is_generated(source["path"]) for source in sources):
        yield sum(rows_of(source) for source in sources)


def rows_of(source: Mapping[str, Any]) -> int:
    """Return the rows of a generated source."""
    with generated_file(source["path"], source["split"]).open(encoding="utf-8") as file:
        rows = sum(1 for _ in file) - source["skip"]
    return min(rows, source["limit"] or rows)


def whole(value: float) -> bool:
    """Return whether a number is whole but for rounding."""
    return abs(value - round(value)) < 1e-6
