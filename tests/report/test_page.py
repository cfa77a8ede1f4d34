"""The report of whole, partial and hostile run directories."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tunesmith.engine.events import (
    Evaluated,
    Event,
    Gathered,
    MicroBatchHalved,
    StepDone,
    Warned,
    as_json,
)
from tunesmith.errors import CheckpointError, DataError
from tunesmith.report.curves import draw, smoothed, thinned
from tunesmith.report.page import metric_rows, write_report
from tunesmith.report.record import read_record
from tunesmith.report.words import change, count, duration, flat, improved, metric, size

VOID = {"meta", "br", "link", "img", "input", "hr"}
SUMMARY = {
    "name": "e2e-lora",
    "model": "smollm2-135m-instruct",
    "method": "lora",
    "objective": "sft",
    "before": {"loss": 3.21, "accuracy": 0.51, "bleu": 3.2},
    "after": {"loss": 0.42, "accuracy": 0.873, "bleu": 2.1},
    "steps": 40,
    "stopped_because": "finished",
    "skipped_steps": 0,
    "seconds": 187.4,
    "tokens": 81234,
    "tokens_per_second": 433.4,
    "supervised_tokens_per_second": 91.0,
    "peak_memory_bytes": 1_900_000_000,
    "trainable_parameters": 4_884_480,
    "total_parameters": 134_515_008,
    "result_bytes": 19_600_000,
    "data": {"train": {"rows": 400, "tokens": 81234, "sources": [{"name": "movie", "rows": 400}]}},
    "proofs": [
        {"name": "tokens supervised", "passed": True, "detail": "812 of 81,234 tokens (1.0%)"},
        {"name": "end of turn supervised", "passed": False, "detail": "in 0 of 8 rows"},
    ],
}
SAMPLES = [
    {
        "prompt": "\u8fd9\u90e8\u7535\u5f71\u597d\u770b\u5417\uff1f",
        "reference": "positive",
        "before": "Sure! <b>Here</b> is what I think",
        "after": "positive",
    },
    {"prompt": "A second one", "reference": "", "before": "", "after": None},
]


def step_done(step: int) -> StepDone:
    return StepDone(
        step=step,
        total=40,
        loss=2 / step if step != 7 else float("nan"),
        learning_rate=1e-4 * (40 - step),
        grad_norm=1.0 + step % 3,
        tokens=2000,
        supervised_tokens=90,
        tokens_per_second=430.0 + step,
        memory_bytes=10**9,
        eta_seconds=1.0,
        epoch=step / 40,
    )


def events() -> list[Event]:
    evaluated = [
        Evaluated(step=step, metrics={"loss": 3 - step / 20, "accuracy": 0.5 + step / 100})
        for step in (0, 20, 40)
    ]
    told = [
        Warned(step=3, message="unused <setting>"),
        MicroBatchHalved(step=4, micro_batch=2, accumulation_steps=2, message="out of memory"),
    ]
    return [*map(step_done, range(1, 41)), *evaluated, *told]


def write_run(directory: Path, *, leave_out: tuple[str, ...] = ()) -> Path:
    lines = [json.dumps(as_json(event)) for event in events()]
    files = {
        "run.yaml": "name: e2e-lora\nmodel:\n  name: <smollm2>\n",
        "summary.json": json.dumps(SUMMARY),
        "environment.json": json.dumps({"seed": 1234, "versions": {"torch": "2.13.0"}}),
        "samples.json": json.dumps(SAMPLES),
        "metrics.jsonl": "\n".join(lines) + '\n{"event": "step_do',
    }
    for name, text in files.items():
        if name not in leave_out:
            (directory / name).write_text(text, encoding="utf-8")
    return directory


def report(directory: Path) -> str:
    return write_report(directory).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Checks that tags close in order, and collects what the tests look at."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.loads += [given[key] or "" for key in ("src", "href", "xlink:href") if key in given]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_a_whole_run_has_every_section(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    assert Outline(page).headings == [
        "Before and after",
        "What it took",
        "Warnings",
        "Curves",
        "Replies before and after",
        "Proofs",
        "Data",
        "Environment",
        "Run file",
    ]
    assert "smollm2-135m-instruct, method lora, objective sft." in page
    assert "+36.3 points" in page
    assert "<dt>Parameters that train</dt><dd>4,884,480</dd>" in page
    assert "3.63%" in page
    assert "Steps skipped" not in page


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    assert all(target.startswith("#") for target in Outline(page).loads)
    namespaces = re.findall(r'xmlns(?::\w+)?="([^"]*)"', page)
    assert page.count("http") == sum("http" in name for name in namespaces)
    assert "<script" not in page
    assert "@import" not in page


def test_every_id_in_the_page_is_there_once(tmp_path: Path) -> None:
    ids = Outline(report(write_run(tmp_path))).ids
    assert sorted({name for name in ids if ids.count(name) > 1}) == []


def test_text_of_the_run_is_escaped_and_chinese_stays_readable(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    assert "&lt;b&gt;Here&lt;/b&gt;" in page
    assert "name: &lt;smollm2&gt;" in page
    assert "unused &lt;setting&gt;" in page
    assert SAMPLES[0]["prompt"] in page


def test_every_curve_says_in_words_what_it_shows(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    labels = re.findall(r'role="img" aria-label="([^"]*)"', page)
    assert len(labels) == page.count("<svg") == 5
    assert labels[0] == (
        "Loss (nats per token): 2 at step 1, 0.05 at step 40; lowest 0.05, highest 2."
    )
    assert labels[1].startswith("Accuracy in evaluation: 0.5 at step 0, 0.9 at step 40")


def test_curves_take_their_colours_from_the_page(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--line)" in drawn
    assert set(re.findall(r"(?:stroke|fill): (#[0-9a-f]+)", drawn)) == set()


def test_metrics_say_in_words_which_got_better(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    assert re.findall(r'<td class="(better|worse)">([^ <]*)', page) == [
        ("better", "-2.7900"),
        ("better", "+36.3"),
        ("worse", "-1.10"),
    ]


@pytest.mark.parametrize(
    "missing", ["run.yaml", "summary.json", "environment.json", "samples.json", "metrics.jsonl"]
)
def test_a_missing_part_is_left_out(tmp_path: Path, missing: str) -> None:
    page = report(write_run(tmp_path, leave_out=(missing,)))
    assert Outline(page).headings


def test_an_empty_directory_gives_a_page_that_says_so(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert Outline(page).headings == []
    assert "No step is recorded yet." in page
    assert f"<h1>{tmp_path.name}</h1>" in page


def test_an_unfinished_run_shows_its_first_and_last_evaluation(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, leave_out=("summary.json",)))
    assert "Unfinished: 39 steps recorded." in page
    assert "+40.0 points" in page


def test_an_early_end_is_said(tmp_path: Path) -> None:
    write_run(tmp_path)
    changed = SUMMARY | {"stopped_because": "early_stopping", "skipped_steps": 2}
    (tmp_path / "summary.json").write_text(json.dumps(changed))
    page = report(tmp_path)
    assert "Stopped early: early stopping." in page
    assert "Steps skipped" in page


@pytest.mark.parametrize("unknown", ["null", "NaN", "-Infinity"])
def test_a_metric_that_was_not_finite_is_a_dash_and_neither_better_nor_worse(
    tmp_path: Path, unknown: str
) -> None:
    write_run(tmp_path)
    summary = f'{{"before": {{"loss": 3.2}}, "after": {{"loss": {unknown}}}}}'
    (tmp_path / "summary.json").write_text(summary)
    (row,) = metric_rows(read_record(tmp_path))
    assert row == ("Loss", "3.2000", "\u2013", "\u2013", None)


def test_the_page_is_the_same_each_time_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert report(tmp_path) == report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before | {"report.html"}


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run directory"):
        write_report(tmp_path / "missing")


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["{broken", "[1]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(DataError, match=r"summary\.json"):
        write_report(tmp_path)


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('3\n{"event": "step_done", "step": 1, "loss": 2.5}\n')
    assert "Loss (nats per token): 2.5 at step 1." in report(tmp_path)


def test_long_courses_are_thinned_to_means() -> None:
    points = [(step, float(step % 2)) for step in range(1000)]
    few = thinned(points, most=100)
    assert len(few) == 100
    assert all(value == 0.5 for _, value in few)
    assert thinned(points[:7], most=100) == points[:7]


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    # Weights 0.5 * 0.5 and 0.5 on 0 and 4: (0.25 * 0 + 0.5 * 4) / 0.75.
    assert smoothed([0.0, 4.0], decay=0.5) == pytest.approx([0.0, 2 / 0.75])


def test_a_logarithmic_scale_is_only_for_positive_values_over_a_decade() -> None:
    points = [(1, 10.0), (2, 1000.0)]
    assert draw("x", points, log=True).svg != draw("x", points).svg
    for unfit in ([(1, 0.0), (2, 1000.0)], [(1, 100.0), (2, 200.0)]):
        assert draw("x", unfit, log=True).svg == draw("x", unfit).svg


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (metric("accuracy", 0.7125), "71.2\u202f%"),
        (metric("loss", 0.42), "0.4200"),
        (metric("bleu", 31.416), "31.42"),
        (metric("bleu", None), "\u2013"),
        (change("loss", 3.0, 1.5), "-1.5000"),
        (change("loss", None, 1.5), "\u2013"),
        (count(1234567), "1,234,567"),
        (size(512), "512 B"),
        (size(3 * 2**19), "1.5 MiB"),
        (size(5 * 2**40), "5120.0 GiB"),
        (duration(42.4), "42 s"),
        (duration(187), "3 min 7 s"),
        (duration(7380), "2 h 3 min"),
    ],
)
def test_numbers_are_written_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_less_loss_and_more_of_anything_else_is_better() -> None:
    assert improved("loss", 2, 1)
    assert not improved("loss", 1, 2)
    assert improved("bleu", 1, 2)
    assert improved("divergence", 2, 1)
    assert improved("calibration_error", 0.2, 0.1)
    assert improved("rejected_log_prob", -1, -2) is None
    assert improved("bleu", 1, 1) is None
    assert improved("bleu", None, 1) is None


def test_nested_facts_become_rows() -> None:
    facts = {"seed": 1234, "memory_bytes": 2**30, "gone": None, "on": True, "share": 0.25}
    nested = {"versions": {"torch": "2.13.0"}, "ids": [1, 2], "sources": [{"rows": 1000}]}
    assert flat(facts | nested) == [
        ("seed", "1234"),
        ("memory bytes", "1.0 GiB"),
        ("on", "yes"),
        ("share", "0.25"),
        ("versions / torch", "2.13.0"),
        ("ids", "1 2"),
        ("sources 1 / rows", "1,000"),
    ]


def test_a_run_that_learns_from_its_replies_shows_its_roll_outs(tmp_path: Path) -> None:
    gathered = [
        Gathered(
            step=step,
            replies=8,
            tokens=80,
            reward=step / 10,
            reward_std=0.1,
            rewards={"length": step / 10},
            length=10.0,
            ended=0.5,
            measured={"kl": step / 5, "kl_coefficient": 0.05},
            tokens_per_second=100.0,
            seconds=1.0,
            samples=[
                {"prompt": f"Ask <{step}>", "reply": "" if step == 5 else "Yes", "reward": 0.5}
            ],
        )
        for step in (1, 5, 9)
    ]
    directory = write_run(tmp_path, leave_out=("metrics.jsonl",))
    lines = [json.dumps(as_json(event)) for event in gathered]
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    page = report(directory)
    assert "Reward of the replies, each roll-out: 0.1 at step 1, 0.9 at step 9" in page
    assert "KL to the reference (nats per reply), each roll-out: 0.2 at step 1" in page
    assert "Tokens per reply, each roll-out: 10 at step 1" in page
    assert "Ask &lt;1&gt;" in page
    assert "Ask &lt;9&gt;" in page
    assert "Ask &lt;5&gt;" not in page
    assert "Variance of returns" not in page
