"""Comparisons of tiny runs: equal conditions, resumed, failed rows, what is written."""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from pairs import pair_rows, write_rows
from reply_runs import run_of as replies_of
from tunesmith.engine.settings import EvaluationSettings
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.compare import compare, default_metric, prepared, safe_rate
from tunesmith.jobs.comparison_findings import Row, findings_of, standard_error
from tunesmith.jobs.comparison_runs import Trial
from tunesmith.jobs.comparison_spec import comparison_from, load_comparison
from tunesmith.jobs.examine import judged_rows
from tunesmith.jobs.features_spec import FeatureSettings
from tunesmith.jobs.prompting_spec import PromptingSettings
from tunesmith.jobs.run_directory import RunDirectory

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.jobs.evidence.store", lambda: tmp_path / "store")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("compare-*.yaml")), ids=lambda p: p.stem)
def test_every_row_of_the_examples_is_a_run(path: Path) -> None:
    comparison = load_comparison(path)
    rows = comparison.rows()
    assert len(rows) >= 18
    for variant in rows:
        assert comparison.run_of(variant, path).name == variant.title


def test_the_command_for_rotten_tomatoes_is_a_comparison() -> None:
    path = EXAMPLES / "ladder.yaml"
    lines = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    start = next(i for i, line in enumerate(lines) if "name=ladder-rotten" in line)
    _, _, file, *overrides = shlex.split(" ".join(lines[start : start + 3]))
    assert EXAMPLES.parent / file == path
    comparison = load_comparison(path, overrides)
    assert comparison.directory.name == "ladder-rotten-tomatoes"
    for variant in comparison.rows():
        data = comparison.run_of(variant, path).data
        assert data.evaluation[0].path.endswith("rotten_tomatoes/test.jsonl")
        assert data.max_length == 64


@pytest.mark.parametrize(
    ("metric", "error", "chosen"),
    [("accuracy", 0.02, 3.0), ("accuracy", 0.0, 9.0), ("loss", 0.05, 1.0), ("loss", 0.3, 1.0)],
)
def test_the_lowest_rate_that_luck_cannot_tell_from_the_best(
    metric: str, error: float, chosen: float
) -> None:
    rates = {9.0: 0.73, 1.0: 0.50, 27.0: 0.52, 3.0: 0.72}
    assert safe_rate(rates, dict.fromkeys(rates, error), metric) == chosen


def test_a_standard_error_is_that_of_a_share(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert standard_error(run, "accuracy") == 0.0  # nothing is known
    run.outcomes.write_text(json.dumps({"accuracy": [1.0] * 300 + [0.0] * 100}))
    assert standard_error(run, "accuracy") == pytest.approx((0.75 * 0.25 / 400) ** 0.5, rel=0.25)


@pytest.fixture
def comparison_file(tmp_path: Path, tiny_model: Path) -> Path:
    rows = [{"prompt": f"Say {n}" * (1 + n % 3), "completion": "yes" * n} for n in range(1, 41)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    path = tmp_path / "three-ways.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "output": str(tmp_path / "runs"),
                "run": {
                    "model": {"name": str(tiny_model), "dtype": "float32"},
                    "data": {
                        "train": [{"path": str(tmp_path / "rows.jsonl")}],
                        "holdout": 16,
                        "max_length": 128,
                    },
                    "train": {"max_steps": 6, "batch_size": 4},
                    "evaluation": {
                        "metrics": ["exact_match"],
                        "max_new_tokens": 4,
                    },
                    "engine": {"device": "cpu"},
                },
                "methods": ["lora", "ia3", "bitfit"],
                "seeds": 2,
                "learning_rates": 2,
                "metric": "loss",
            }
        )
    )
    return path


def test_a_comparison_ranks_measures_and_goes_on_where_it_was(comparison_file: Path) -> None:
    comparison = load_comparison(comparison_file)
    said: list[str] = []
    findings = compare(comparison, comparison_file, said.append)
    rows = {row.name: row for row in findings.rows}
    assert findings.rows[0].name == "untuned"
    assert rows["bitfit"].failed is not None  # a Llama has no biases
    assert "biases" in rows["bitfit"].failed
    for name in ("lora", "ia3"):
        row = rows[name]
        assert len(row.values) == 2
        assert row.quality == pytest.approx(sum(row.values) / 2)
        assert row.trainable_parameters
        assert row.stored_bytes
        assert row.process_bytes
        assert row.slowdown
        assert row.general_before == pytest.approx(rows["lora"].general_before)
        assert len(row.rates) >= 2
        assert row.low is not None
        assert row.low <= row.quality <= row.high
    trained = [row.quality for row in findings.trained]
    assert trained == sorted(trained)  # by loss, the least first

    directory = comparison.directory
    written = json.loads((directory / "comparison.json").read_text())
    assert written["rows"][1]["values"] == findings.rows[1].values
    table = list(csv.DictReader((directory / "comparison.csv").open()))
    assert [line["name"] for line in table] == [row.name for row in findings.rows]
    assert "<svg" in (directory / "report.html").read_text()

    stamps = {path: path.stat().st_mtime_ns for path in directory.glob("*/*/summary.json")}
    (directory / "lora" / "seed-1" / "summary.json").unlink()
    again = compare(comparison, comparison_file, said.append)
    assert [row.values for row in again.rows] == [row.values for row in findings.rows]
    kept = {p: s for p, s in stamps.items() if p.parent != directory / "lora" / "seed-1"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_prompting_is_a_row_beside_training(comparison_file: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}", "completion": "yes" * (1 + n % 3)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    shots = ", ".join(f"{{prompting: {{shots: {count}}}}}" for count in (0, 2, 9))
    comparison = load_comparison(
        comparison_file,
        ["methods=[lora]", f"variants=[{shots}]", "learning_rates=1", "run.data.holdout=6"],
    )
    findings = compare(comparison, comparison_file, lambda line: None)
    found = {row.name: row for row in findings.rows}
    zero, few, untuned = found["zero-shot"], found["2-shot"], found["untuned"]
    assert zero.quality == pytest.approx(untuned.quality, rel=1e-6)
    assert len(zero.values) == 1  # no seed changes it
    assert len(set(few.values)) == 2  # other examples
    for row in (zero, few):
        assert row.trainable_parameters == row.stored_bytes == row.steps == 0
        assert row.forgetting == 0.0
        assert row.low is not None
    assert zero.prompt_tokens == 0
    assert few.prompt_tokens is not None
    assert few.prompt_tokens > 20
    assert "9: the longest prompt has" in (found["9-shot"].failed or "")
    assert "2-shot" in (comparison.directory / "report.html").read_text()


def test_a_budget_that_is_too_small_says_what_would_be_needed(comparison_file: Path) -> None:
    comparison = load_comparison(comparison_file, ["budget=1s", "methods=[lora]"])
    with pytest.raises(SpecError, match=r"budget: 1 s leaves lora, .* 10 need about"):
        compare(comparison, comparison_file, lambda line: None)


def test_a_budget_is_a_length_of_time(comparison_file: Path) -> None:
    comparison = load_comparison(
        comparison_file, ["budget=3min", "methods=[lora]", "seeds=1", "learning_rates=1"]
    )
    with pytest.raises(SpecError, match="never"):
        load_comparison(comparison_file, ["budget=never"])
    assert comparison.budget == 180


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods=[]", "nothing to compare"),
        ("methods=[lora,lora]", "two rows are called 'lora'"),
        ("variant=[]", "variant: is no setting; use one of name, output, run"),
        ("variants=[{methods: ia3}]", "is no setting; use one of name, method"),
        ("variants=[{set: [train.batch_size=8]}]", "a row of the run's own method has no name"),
        ("seeds=0", "seeds"),
    ],
)
def test_what_makes_no_comparison_is_refused(
    comparison_file: Path, override: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        load_comparison(comparison_file, [override])


@pytest.mark.parametrize(
    ("objective", "metric"),
    [
        ("{name: classification}", "accuracy"),
        ("{name: classification, kind: multi}", "loss"),
        ("{name: classification, kind: regression}", "loss"),
        ("{name: token_classification}", "loss"),
        ("{name: grpo, rewards: [{kind: regex, pattern: a}]}", "reward"),
    ],
)
def test_what_decides_is_measured_of_every_objective(
    comparison_file: Path, objective: str, metric: str
) -> None:
    overrides = [f"run.objective={objective}", "run.evaluation={}"]
    comparison = load_comparison(comparison_file, overrides)
    assert default_metric(comparison.run_of(comparison.rows()[0], comparison_file)) == metric


def test_a_rate_at_which_the_loss_is_no_number_is_left_out(comparison_file: Path) -> None:
    overrides = [
        "methods=[lora]",
        "variants=[{name: wild, method: lora, set: [train.learning_rate=1e20]}]",
        "seeds=1",
        "run.train.warmup=0",
    ]
    comparison = load_comparison(comparison_file, overrides)
    findings = compare(comparison, comparison_file, lambda line: None)
    wild = next(row for row in findings.rows if row.name == "wild")
    assert wild.failed == "loss is not finite at any rate tried"
    assert [row.name for row in findings.trained] == ["lora"]
    for path in comparison.directory.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("loss", ["null", "NaN", "Infinity"])
def test_a_row_with_a_seed_that_diverged_has_no_result(tmp_path: Path, loss: str) -> None:
    """Files hold null; those of earlier versions hold Python's bare words."""
    runs = [RunDirectory(tmp_path / name) for name in "ab"]
    for run, found in zip(runs, ("0.5", loss), strict=True):
        run.path.mkdir()
        run.summary.write_text(f'{{"after": {{"loss": {found}}}}}')
    row = Row("lora", {}, None, {}, None, runs, None)
    rows = findings_of("job", "loss", [row]).rows
    assert [row.failed for row in rows] == ["loss is not finite after training, with 1 of 2 seeds"]


def test_what_a_row_forgot_is_not_known_where_one_seed_has_no_finite_number(
    tmp_path: Path,
) -> None:
    runs = [RunDirectory(tmp_path / name) for name in "ab"]
    summary = {
        "model": "m", "kind": "decoder", "objective": "sft", "hardware": {}, "before": {},
        "after": {"loss": 0.5}, "data": {"train": {"kept": 8}}, "trainable_parameters": 1,
        "total_parameters": 2, "result_bytes": 4, "peak_process_bytes": 1, "steps": 1,
        "peak_device_bytes": None,
    }  # fmt: skip
    for run, after in zip(runs, (4.0, None), strict=True):
        run.path.mkdir()
        general = {"general_loss": {"before": 3.0, "after": after}}
        run.summary.write_text(json.dumps(summary | general))
        run.environment.write_text(json.dumps({"started": "", "versions": {}}))
    (row,) = findings_of("job", "loss", [Row("lora", {}, None, {}, None, runs, None)]).rows
    assert (row.quality, row.general_before, row.general_after) == (0.5, 3.0, None)
    assert row.forgetting is None


def test_a_row_with_a_seed_that_failed_has_no_result(comparison_file: Path) -> None:
    overrides = ["methods=[lora,ia3]", "learning_rates=1", "run.train.max_steps=1"]
    comparison = load_comparison(comparison_file, overrides)
    in_its_way = comparison.directory / "lora" / "seed-1" / "notes"
    in_its_way.mkdir(parents=True)
    findings = compare(comparison, comparison_file, lambda line: None)
    assert [row.name for row in findings.trained] == ["ia3"]
    (failed,) = (row for row in findings.rows if row.failed)
    assert failed.failed.startswith("seed-1: output: ")
    in_its_way.rmdir()
    in_its_way.parent.rmdir()
    findings = compare(comparison, comparison_file, lambda line: None)
    assert sorted(row.name for row in findings.trained) == ["ia3", "lora"]
    assert [len(row.values) for row in findings.trained] == [2, 2]


def test_an_unknown_method_is_refused_before_anything_runs(comparison_file: Path) -> None:
    comparison = load_comparison(comparison_file, ["methods=[lora,lorra]"])
    with pytest.raises(SpecError, match="did you mean 'lora'"):
        compare(comparison, comparison_file, lambda line: None)
    assert not comparison.directory.exists()


def test_a_metric_that_is_not_measured_ends_the_first_run(comparison_file: Path) -> None:
    comparison = load_comparison(comparison_file, ["methods=[ia3,lora]", "metric=blue"])
    told: list[str] = []
    with pytest.raises(SpecError, match=r"metric: 'blue' is not measured; use one of .*loss"):
        compare(comparison, comparison_file, told.append)
    assert told == []


def test_a_comparison_without_rows_to_judge_by_is_refused(comparison_file: Path) -> None:
    comparison = load_comparison(comparison_file, ["run.data.holdout=0"])
    with pytest.raises(SpecError, match=r"lora: data\.holdout: no rows are kept to judge by"):
        compare(comparison, comparison_file, lambda line: None)


def test_one_evaluation_row_cannot_be_parted_into_even_and_odd() -> None:
    settings = EvaluationSettings(rows="odd")
    with pytest.raises(DataError, match=r"evaluation\.rows: odd leaves none of 1 evaluation row"):
        judged_rows([1], settings)
    assert judged_rows([], settings) == []
    assert judged_rows([1, 2], settings) == [2]


def test_replies_that_runs_write_are_compared_by_their_reward(
    tmp_path: Path, tiny_model: Path
) -> None:
    run = replies_of(tmp_path, tiny_model, train={"max_steps": 3})
    values = {
        "name": "replies", "output": str(tmp_path / "runs"), "methods": ["lora"], "seeds": 1,
        "learning_rates": 1, "jobs": 2, "run": run.model_dump(mode="json", exclude_unset=True),
    }  # fmt: skip
    path = tmp_path / "replies.yaml"
    path.write_text(yaml.safe_dump(values))
    (row,) = compare(load_comparison(path), path, lambda line: None).trained
    assert row.seconds_per_step is not None  # of the run that was alone, after the others


@pytest.mark.parametrize("metric", ["loss", "reward_accuracy"])
def test_preferences_are_compared_with_scipys_paired_bootstrap_over_pairs(
    comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    rows = pair_rows(64)
    for row in rows[::3]:  # so that neither way ranks all of them right
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_rows(tmp_path / "rows.jsonl", rows)
    overrides = [
        "run.objective={name: dpo}", "run.data.holdout=40", "run.evaluation={samples: 0}",
        "methods=[lora, ia3]", "seeds=1", "learning_rates=1", f"metric={metric}",
    ]  # fmt: skip
    comparison = load_comparison(comparison_file, overrides)
    findings = compare(comparison, comparison_file, lambda line: None)
    assert findings.rows[0].name == "untuned"  # a model that has no head to be random
    best, other = findings.trained
    scores = [
        np.array(json.loads((path / "seed-0" / "outcomes.json").read_text())[metric])
        for path in (comparison.directory / row.name for row in (best, other))
    ]

    def drawn(values: tuple[np.ndarray, ...], statistic: Any) -> Any:
        return stats.bootstrap(
            values, statistic, paired=True, n_resamples=6000, method="percentile",
            rng=np.random.default_rng(0),
        )  # fmt: skip

    for row, of_row in zip((best, other), scores, strict=True):
        assert row.quality == pytest.approx(of_row.mean())
        expected = drawn((of_row,), np.mean).confidence_interval
        # The ends of 1,000 resamples lie within some 2 % of the width, and shares are 1 / 40 apart.
        near = pytest.approx(tuple(expected), abs=0.1 * (expected.high - expected.low))
        assert (row.low, row.high) == near
    apart = drawn(
        tuple(scores), lambda one, two, axis: one.mean(axis) - two.mean(axis)
    ).bootstrap_distribution
    smaller = min((apart <= 0).mean(), (apart >= 0).mean())
    assert other.p_value == pytest.approx(min(1.0, 2 * smaller), abs=0.05)


def test_a_file_that_is_not_there_is_no_comparison_file() -> None:
    with pytest.raises(SpecError, match=r"nosuch\.yaml: no such comparison file"):
        load_comparison("nosuch.yaml")


def test_a_run_file_is_told_from_a_comparison_file() -> None:
    with pytest.raises(SpecError, match=r"is a run file, .* `tunesmith train` runs this one"):
        load_comparison(EXAMPLES / "e2e-lora.yaml")


def test_a_row_is_one_thing(comparison_file: Path) -> None:
    with pytest.raises(SpecError, match="a row has method or prompting, not both"):
        load_comparison(comparison_file, ["variants=[{method: lora, prompting: {shots: 1}}]"])
    with pytest.raises(SpecError, match="two rows are called '2-shot'"):
        load_comparison(
            comparison_file, ["variants=[{prompting: {shots: 2}}, {prompting: {shots: 2}}]"]
        )


def test_all_methods_of_a_decoder_come_with_prompting(comparison_file: Path) -> None:
    run = load_comparison(comparison_file).base(comparison_file)

    def titles(**settings: str | None) -> list[str]:
        asked = {"methods": "all", "budget": None} | settings
        model, data = run["model"]["name"], run["data"]["train"][0]["path"]
        comparison, _ = comparison_from(None, [], model=model, data=data, **asked)
        return [variant.title for variant in comparison.rows()]

    assert titles()[-2:] == ["zero-shot", "4-shot"]
    assert titles(methods="lora,ia3") == ["lora", "ia3"]


def test_forgetting_is_measured_of_decoders_unless_the_run_says_no(
    comparison_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(load_comparison(comparison_file).base(comparison_file))
    )

    def general(*overrides: str) -> str | None:
        comparison = load_comparison(comparison_file, list(overrides))
        return prepared(comparison, comparison.rows()[0], comparison_file).evaluation.general

    assert general() == "bundled"
    assert general("run=base.yaml") == "bundled"
    assert general("run.evaluation.general=null") is None


def test_a_run_of_an_earlier_version_still_counts(comparison_file: Path) -> None:
    comparison = load_comparison(comparison_file)
    run = comparison.run_of(comparison.rows()[0], comparison_file)
    run = run.model_copy(update={"output": str(comparison.directory / "lora")})
    for trial in (
        Trial("lora", run, keep=False),
        Trial("features", run, keep=False, features=FeatureSettings(C=0.5)),
        Trial("2-shot", run, keep=False, prompting=PromptingSettings(shots=2)),
    ):
        trial.directory.path.mkdir(parents=True, exist_ok=True)
        trial.directory.summary.write_text("{}")
        asked = yaml.safe_load(trial.to_yaml())
        del asked["evaluation"]["inference"], asked["engine"]["padding"]  # as if they were new
        trial.asked.write_text(yaml.safe_dump(asked))
        assert trial.finished()
        asked["engine"] |= {"checkpointing": "none", "speed": "safe"}  # what auto may choose
        trial.asked.write_text(yaml.safe_dump(asked))
        assert trial.finished()
        place = Path(asked["output"])
        asked["output"] = str(Path("/elsewhere").joinpath(*place.parts[-2:]))  # and moved here
        trial.asked.write_text(yaml.safe_dump(asked))
        assert trial.finished()
        asked["seed"] = 5
        trial.asked.write_text(yaml.safe_dump(asked))
        assert not trial.finished()
        trial.asked.write_text("no longer: understood")
        assert not trial.finished()


def test_a_run_with_another_way_to_compute_its_steps_than_asked_for_does_not_count(
    comparison_file: Path,
) -> None:
    comparison = load_comparison(comparison_file, ["run.engine.checkpointing=full"])
    run = comparison.run_of(comparison.rows()[0], comparison_file)
    run = run.model_copy(update={"output": str(comparison.directory / "lora")})
    trial = Trial("lora", run, keep=False)
    trial.directory.path.mkdir(parents=True, exist_ok=True)
    trial.directory.summary.write_text("{}")
    trial.asked.write_text(trial.to_yaml().replace("checkpointing: full", "checkpointing: none"))
    assert not trial.finished()  # its memory and times would not be those that were asked for
    trial.asked.write_text(trial.to_yaml())
    assert trial.finished()
