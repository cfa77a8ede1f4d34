"""Every method on real data in one table: `python bench/methods.py ENCODER DECODER [--speed]`.

ENCODER and DECODER are the directories that these left behind (hours on a CPU, minutes on a GPU):

    tunesmith compare examples/compare-sentiment.yaml
    tunesmith compare examples/compare-e2e.yaml

Reads what their runs measured, and writes bench/results/methods.json and methods.md: quality, size
and memory of every method, and the learning rates tried, from which the defaults were chosen. Of a
comparison that did not get beyond the search for rates, the best of those runs is shown. With
--speed it also takes a few steps of every method of the first comparison here, one after the other,
and shows the time of a step over LoRA's.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tunesmith.jobs.comparison_runs import Trial, run_trials
from tunesmith.jobs.comparison_spec import METHODS, load_comparison
from tunesmith.report.words import count, size

RESULTS = Path(__file__).parent / "results"
SPEED_STEPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("decoder", type=Path)
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    found = {
        "encoder": read(arguments.encoder, "accuracy"),
        "decoder": read(arguments.decoder, "bleu"),
    }
    path = RESULTS / "methods.json"
    if arguments.speed:
        found["seconds_per_step"] = speed(Path("examples/compare-sentiment.yaml"))
    elif path.exists():
        found["seconds_per_step"] = json.loads(path.read_text()).get("seconds_per_step", {})
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "methods.md").write_text(table(found), encoding="utf-8")
    print(table(found))


def read(directory: Path, metric: str) -> dict[str, Any]:
    """Return what the runs of a comparison measured, by row."""
    rows = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        searched = [run for run in runs(folder, "rate-") if run["after"].get(metric) is not None]
        final = [run for run in runs(folder, "seed-") if run["after"].get(metric) is not None]
        if not searched:
            failed = sorted(folder.glob("*.failed.txt"))
            rows[folder.name] = {"failed": failed[0].read_text().strip() if failed else "no run"}
            continue
        best = max(searched, key=lambda run: run["after"][metric])
        shown = final or [best]
        rows[folder.name] = {
            "rates": {run["rate"]: run["after"][metric] for run in searched},
            "search_steps": best["steps"],
            "best_rate": best["rate"],
            "final": [run["after"][metric] for run in final],
            "final_steps": final[0]["steps"] if final else None,
            "quality": sum(run["after"][metric] for run in shown) / len(shown),
            "trainable_parameters": shown[0]["trainable_parameters"],
            "total_parameters": shown[0]["total_parameters"],
            "stored_bytes": shown[0]["result_bytes"],
            "peak_device_bytes": shown[0]["peak_device_bytes"],
            "peak_process_bytes": shown[0]["peak_process_bytes"],
        }
    for name, row in table_of(directory).items():
        # Where only the table was kept of a row, it says the same of its final runs.
        rows.setdefault(name, row)
    some = next(run for folder in directory.iterdir() for run in runs(folder, "rate-"))
    return {
        "comparison": directory.name,
        "model": some["model"],
        "metric": metric,
        "hardware": some["hardware"],
        "rows": rows,
    }


def table_of(directory: Path) -> dict[str, Any]:
    """Return the rows of comparison.json, where the comparison came to its end."""
    path = directory / "comparison.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {
        row["name"]: {
            "rates": row["rates"],
            "best_rate": f"{row['learning_rate']:.3g}",
            "final": row["values"],
            "final_steps": row["steps"],
            "quality": row["quality"],
            "trainable_parameters": row["trainable_parameters"],
            "total_parameters": row["total_parameters"],
            "stored_bytes": row["stored_bytes"],
            "peak_device_bytes": row["device_bytes"],
            "peak_process_bytes": row["process_bytes"],
        }
        for row in rows
        if row["learning_rate"] is not None and row["quality"] is not None
    }


def runs(folder: Path, prefix: str) -> list[dict[str, Any]]:
    """Return the summaries of a row's finished runs of one kind."""
    found = []
    for path in sorted(folder.glob(f"{prefix}*/summary.json")):
        summary = json.loads(path.read_text())
        if prefix == "rate-":
            summary["rate"] = path.parent.name.removeprefix(prefix)
        found.append(summary)
    return found


def speed(source: Path) -> dict[str, float]:
    """Return seconds a step of every method on this machine, each alone."""
    comparison = load_comparison(source)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in comparison.rows():
            run = comparison.run_of(variant, source)
            run = run.model_copy(
                update={
                    "output": folder,
                    "train": run.train.model_copy(update={"max_steps": SPEED_STEPS}),
                    "evaluation": run.evaluation.model_copy(update={"limit": 8, "samples": 0}),
                }
            )
            trial = Trial(variant.title, run, keep=False)
            for done in run_trials([trial], at_once=1, done=lambda _: None):
                summary = done.summary()
                found[variant.title] = summary["seconds"] / summary["steps"]
                print(f"{variant.title}: {found[variant.title]:.3f} s a step", flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    encoder, decoder = found["encoder"], found["decoder"]
    pace = found.get("seconds_per_step") or {}
    names = [*METHODS, *sorted(set(decoder["rows"]) - set(METHODS))]
    lines = [
        "# Every method on real data",
        "",
        "Written by `python bench/methods.py`.",
        f"Encoder: {about(encoder)} Decoder: {about(decoder)}",
        "Rates were searched by powers of 3 until the best was not at the edge (at most two more);",
        "the defaults of the methods were chosen from these, between the best of both tasks.",
        *(["Time: a step over LoRA's, each method alone on 2 CPU cores, encoder."] if pace else []),
        "",
        "| method | accuracy | rate | trains | stored | peak memory | BLEU | rate | trains "
        "| stored | peak memory | time |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cells = [*shown(encoder, name), *shown(decoder, name), "-"]
        if name in pace and "lora" in pace:
            cells[-1] = f"{pace[name] / pace['lora']:.2f} x"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    failed = [
        f"- {name} on the {kind}: {rows[name]['failed']}"
        for kind, rows in (("encoder", encoder["rows"]), ("decoder", decoder["rows"]))
        for name in sorted(rows)
        if "failed" in rows[name]
    ]
    return "\n".join([*lines, "", *failed]).rstrip() + "\n"


def about(task: dict[str, Any]) -> str:
    """Return a task's conditions in words."""
    row = next(row for row in task["rows"].values() if "search_steps" in row)
    device = ", ".join(task["hardware"]["cuda_devices"]) or task["hardware"]["processor"]
    steps = (
        f"{len(row['final'])} seeds of {row['final_steps']} steps"
        if row["final"]
        else f"the best of the runs of {row['search_steps']} steps that searched for the rate"
    )
    return f"{task['model']}, {task['metric']}, {steps}, {device}."


def shown(task: dict[str, Any], name: str) -> list[str]:
    """Return a method's cells for one task."""
    row = task["rows"].get(name)
    if row is None or "failed" in row:
        return ["-"] * 5
    share = 100 if task["metric"] == "accuracy" else 1
    memory = row["peak_device_bytes"] or row["peak_process_bytes"]
    return [
        f"{share * row['quality']:.1f}{' %' if share == 100 else ''}",
        row["best_rate"],
        count(row["trainable_parameters"]),
        size(row["stored_bytes"]),
        size(memory),
    ]


if __name__ == "__main__":
    main()
