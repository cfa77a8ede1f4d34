"""What the record and the console make of events."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from tunesmith.engine.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    Gathered,
    MicroBatchHalved,
    RunFinished,
    RunStarted,
    Sampled,
    StepDone,
    Warned,
)
from tunesmith.engine.listeners import Console, JsonlWriter, duration

STARTED = RunStarted(
    step=0,
    total=40,
    processes=2,
    device="cuda:0",
    micro_batch=2,
    effective_batch=8,
    trainable_parameters=4_884_480,
)
STEP = StepDone(
    step=3,
    total=40,
    loss=1.25,
    learning_rate=1e-4,
    grad_norm=0.5,
    tokens=2048,
    supervised_tokens=512,
    tokens_per_second=15_899.4,
    memory_bytes=3 * 2**30,
    eta_seconds=187,
    epoch=0.1,
    metrics={"accuracy": 0.5},
)
SKIPPED = StepDone(**{**vars(STEP), "loss": float("nan"), "skipped": True})
GATHERED = Gathered(
    step=4,
    replies=1,
    tokens=3,
    reward=0.5,
    reward_std=0.0,
    rewards={"length": 0.5},
    length=3.0,
    ended=1.0,
    measured={"kl": float("nan")},
    tokens_per_second=3.0,
    seconds=1.0,
    samples=[{"prompt": "a", "reply": "b", "reward": float("nan")}],
)
FINISHED = RunFinished(
    step=40,
    total=40,
    stopped_because="early_stopping",
    seconds=3725,
    tokens=80_000,
    tokens_per_second=21.5,
    skipped_steps=0,
    memory_bytes=0,
)


def shown(*events: Event, terminal: bool = False) -> str:
    screen = io.StringIO()
    console = Console(Terminal(file=screen, force_terminal=terminal, width=120))
    for event in events:
        console(event)
    console.close()
    return screen.getvalue()


def test_each_event_is_one_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write = JsonlWriter(path)
    for event in (STARTED, STEP, Sampled(step=3, prompt="\u4f60\u597d", reply="a\nb")):
        write(event)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [line["event"] for line in lines] == ["run_started", "step_done", "sampled"]
    assert (lines[1]["loss"], lines[1]["metrics"]) == (1.25, {"accuracy": 0.5})
    assert lines[2]["prompt"] == "\u4f60\u597d"


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write = JsonlWriter(path)
    write(STEP)
    assert path.read_text().endswith("}\n")
    write.close()


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write = JsonlWriter(path)
    write(SKIPPED)
    write(Evaluated(step=3, metrics={"loss": float("inf")}))
    write(GATHERED)
    write.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.open()]
    assert (lines[0]["loss"], lines[1]["metrics"]["loss"]) == (None, None)
    assert lines[2]["measured"] == {"kl": None}
    assert lines[2]["samples"] == [{"prompt": "a", "reply": "b", "reward": None}]


def test_a_resumed_run_without_a_record_starts_one(tmp_path: Path) -> None:
    write = JsonlWriter(tmp_path / "metrics.jsonl")
    write(RunStarted(**{**vars(STARTED), "step": 2, "resumed_from": "elsewhere"}))
    write(FINISHED)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_from_the_start_keeps_its_own_lines_and_none_of_an_earlier_process(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step_done", "step": 1}\n{"event": "step_')
    write = JsonlWriter(path)
    for event in (Warned(step=0, message="first"), STARTED, STEP):
        write(event)
    kinds = [json.loads(line)["event"] for line in path.open()]
    assert kinds == ["warned", "run_started", "step_done"]


def test_without_a_terminal_each_step_is_a_plain_line() -> None:
    assert shown(STARTED, STEP).splitlines() == [
        "training 4,884,480 parameters on 2 x cuda:0, steps 1 to 40 of 8 rows",
        "step 3/40  loss 1.2500  15,899 tokens/s  3.0 GiB  3:07 left",
    ]


def test_in_a_terminal_a_bar_shows_the_step() -> None:
    text = shown(STARTED, STEP, FINISHED, terminal=True)
    assert "3/40" in text
    assert "15,899 tokens/s" in text
    assert "step 3/40" not in text


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (SKIPPED, "step 3/40  skipped: loss or gradient is not finite"),
        (
            Evaluated(step=4, metrics={"loss": 1.5, "bleu": 0.25}, best=True),
            "evaluation at step 4  loss 1.5000  bleu 0.2500  (best)",
        ),
        (
            CheckpointSaved(step=4, path="runs/[a]", seconds=1.0, size_bytes=2**20),
            "saved runs/[a] (1.0 MiB)",
        ),
        (Warned(step=4, message="look out"), "warning: look out"),
        (
            MicroBatchHalved(step=4, micro_batch=1, accumulation_steps=2, message="smaller"),
            "warning: smaller",
        ),
        (FINISHED, "early stopping at step 40 after 1:02:05, 22 tokens/s"),
    ],
)
def test_other_events_are_lines_too(event: Event, line: str) -> None:
    assert shown(event).splitlines() == [line]


def test_samples_are_left_to_the_report() -> None:
    assert shown(Sampled(step=1, prompt="a", reply="b")) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (7383, "2:03:03")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
