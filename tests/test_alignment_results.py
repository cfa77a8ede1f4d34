"""What bench/alignment.py makes of run directories, those that were cut off among them."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
HARDWARE = {"cuda_devices": ["A GPU"], "processor": "a processor"}
PROBLEMS = "generated/arithmetic:largest=9,operations=add,test_rows=8,rows=20"
ANSWERS = {"kl": 0.0, "length": 5.0, "ended": 1.0}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The program, with its results in a folder of the test."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    module = importlib.import_module("alignment")
    monkeypatch.setattr(module, "FOUND", tmp_path / "alignment.json")
    monkeypatch.setattr(module, "PAGE", tmp_path / "alignment.md")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for name in module.FILLED:
        text = "<!-- grpo -->\n<!-- end grpo -->\n"
        (tmp_path / "docs" / name).write_text(text, encoding="utf-8")
    return module


def event(kind: str, time: float, step: int, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, "step": step, **fields}


def cut_off(folder: Path, *, start: float = 100.0, right: int = 6) -> list[dict[str, Any]]:
    """A run of 8 held-out problems: evaluated at 0 and 2, taken up again after 3, killed in 5."""
    begun = {"total": 10, "trainable_parameters": 7, "resumed_from": None}
    done = {"total": 10, "memory_bytes": 99}
    events = [
        event("run_started", start, 0, **begun),
        event("evaluated", start + 1, 0, metrics={"reward": 0.125, **ANSWERS}),
        event("sampled", start + 1, 0, prompt="1 + 1?", reply="one"),
        event("step_done", start + 5, 1, **done),
        event("step_done", start + 9, 2, **done),
        event("run_started", start + 500, 1, **begun),
        event("step_done", start + 504, 2, **done),
        event("evaluated", start + 510, 2, metrics={"reward": right / 8, **ANSWERS}),
        event("sampled", start + 510, 2, prompt="1 + 1?", reply="2"),
        event("step_done", start + 520, 5, **done),
    ]
    gathered = {
        "reward": 0.5,
        "reward_std": 0.25,
        "samples": [],
        "rewards": {"number": 0.5},
        "length": 5.0,
        "ended": 1.0,
    }
    events.insert(3, event("gathered", start + 2, 1, measured={}, **gathered))
    source = {"path": PROBLEMS, "split": "test", "skip": 0, "limit": None}
    run = {
        "seed": 0,
        "model": {"name": "tiny"},
        "method": {"name": "lora"},
        "objective": {"name": "grpo"},
        "data": {"train": [source | {"split": None}], "evaluation": [source]},
        "train": {"learning_rate": 0.001},
        "evaluation": {"limit": None},
    }
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(one) + "\n" for one in events)
    (folder / "metrics.jsonl").write_text(lines + '{"event": "step_d', encoding="utf-8")
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({"hardware": HARDWARE}), encoding="utf-8")
    samples = [{"prompt": "1 + 1?", "reference": "2", "before": "one"}]
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    return events


def collect(bench: Any, monkeypatch: pytest.MonkeyPatch, *folders: Path) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["alignment.py", "--collect", *map(str, folders)])
    bench.main()
    found: dict[str, Any] = json.loads(bench.FOUND.read_text(encoding="utf-8"))
    return found


def test_a_run_that_was_cut_off_counts_up_to_its_last_evaluation(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cut_off(tmp_path / "there" / "grpo-arithmetic")
    run = collect(bench, monkeypatch, tmp_path / "there")["grpo-arithmetic"]
    assert run["stopped"] == {"at": 5, "of": 10, "how": "killed"}
    assert (run["steps"], run["before"]["reward"], run["after"]["reward"]) == (2, 0.125, 0.75)
    assert run["seconds"] == 9 + 10  # the pause between the two parts is nobody's time
    assert run["samples"][0]["before"] == "one"
    assert run["samples"][0]["after"] == "2"
    page = bench.PAGE.read_text(encoding="utf-8")
    assert "at step 5 of 10" in page
    assert "75.0% (40.9% to 92.9%)" in page  # Wilson's interval of 6 of 8
    assert str(tmp_path) not in bench.FOUND.read_text(encoding="utf-8") + page


def test_a_run_without_a_step_is_none(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "there" / "grpo-arithmetic"
    cut_off(folder)
    (folder / "metrics.jsonl").unlink()
    assert collect(bench, monkeypatch, tmp_path / "there") == {}
    assert "Not measured yet." in bench.PAGE.read_text(encoding="utf-8")


def test_collecting_more_keeps_what_came_further(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cut_off(tmp_path / "there" / "grpo-arithmetic", right=6)
    collect(bench, monkeypatch, tmp_path / "there")
    further = tmp_path / "further" / "grpo-arithmetic"
    cut_off(further, right=7)
    cut_off(tmp_path / "further" / "grpo-arithmetic-hard", start=1000.0, right=2)
    found = collect(bench, monkeypatch, tmp_path / "further")
    assert {name: run["after"]["reward"] for name, run in found.items()} == {
        "grpo-arithmetic": 0.875,
        "grpo-arithmetic-hard": 0.25,
    }
    less = tmp_path / "less" / "grpo-arithmetic"
    events = cut_off(less)
    text = "".join(json.dumps(one) + "\n" for one in events[:5])
    (less / "metrics.jsonl").write_text(text, encoding="utf-8")
    found = collect(bench, monkeypatch, tmp_path / "less")
    assert found["grpo-arithmetic"]["after"]["reward"] == 0.875


def test_a_look_does_not_outrank_a_run_that_was_cut_off(bench: Any) -> None:
    long, look = {"steps": 100, "stopped": {"at": 137, "of": 200}}, {"steps": 2}
    done = {"steps": 100}
    judged = {"verdicts": [{}], "stages": {"sft": look}}
    assert [bench.progress(one) for one in (judged, done, long, look, {})] == sorted(
        (bench.progress(one) for one in (look, long, judged, {}, done)), reverse=True
    )


def test_a_count_that_the_shares_contradict_is_not_told(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "there" / "grpo-arithmetic"
    cut_off(folder)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    third = lines.replace('"ended": 1.0}}', '"ended": 0.3}}')
    (folder / "metrics.jsonl").write_text(third, encoding="utf-8")
    run = collect(bench, monkeypatch, tmp_path / "there")["grpo-arithmetic"]
    assert "held_out_prompts" not in run
    assert "75.0% |" in bench.PAGE.read_text(encoding="utf-8")


def test_a_chain_counts_the_stages_that_ran(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chain = tmp_path / "there" / "rlhf-politeness"
    cut_off(chain / "ppo")
    cut_off(chain / "judge")
    (chain / "judge" / "metrics.jsonl").unlink()
    asked = {"stages": [{"name": name} for name in ("ppo", "judge", "never")]}
    (chain / "align.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    found = collect(bench, monkeypatch, tmp_path / "there")["rlhf-politeness"]
    assert list(found["stages"]) == ["ppo"]
    assert found["not_run"] == ["judge", "never"]
    page = bench.PAGE.read_text(encoding="utf-8")
    assert "Did not run: judge, never." in page
    assert "the rewards of a roll-out's replies differ by 0.25" in page
    assert "the chain was stopped before its policies were judged" in page


def test_runs_at_the_same_time_on_one_device_are_told(bench: Any, tmp_path: Path) -> None:
    words = importlib.import_module("alignment_words")
    runs = [
        {"device": "A GPU", "ran": [[0, 10]]},
        {"device": "A GPU", "ran": [[5, 20]]},
        {"device": "A GPU", "ran": [[20, 30]]},
        {"device": "another", "ran": [[0, 30]]},
    ]
    found = {str(number): run for number, run in enumerate(runs)}
    assert [words.beside(found, run) for run in runs] == [1, 1, 0, 0]


def test_what_a_chain_leaves_out_of_its_example_is_said(bench: Any, tmp_path: Path) -> None:
    example = ROOT / "examples" / "ppo-sentiment.yaml"
    asked = yaml.safe_load(
        importlib.import_module("alignment_facts").load_alignment(example).to_yaml()
    )
    del asked["stages"][2]["run"]["data"]["pretraining"]
    asked["stages"][3]["run"]["train"]["max_steps"] = 7
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    assert bench.changed(tmp_path, example) == [
        "stages.3.run.train.max_steps=7",
        "stages.2.run.data.pretraining=[]",
    ]


def test_seeds_of_the_same_settings_are_one_line_of_the_legend(bench: Any) -> None:
    pictures = importlib.import_module("alignment_pictures")
    courses = {f"ppo-{seed}, {kind}": [(0, 0.1), (1, 0.2)] for kind in "ab" for seed in range(6)}
    svg = pictures.lines("title", courses, courses, y="y")
    assert svg.count("a, 6 seeds") == svg.count("b, 6 seeds") == 1
