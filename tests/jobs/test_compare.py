"""Comparisons of tiny runs: equal conditions, resumed, failed rows, what is written."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from tunesmith.errors import SpecError
from tunesmith.jobs.compare import compare
from tunesmith.jobs.comparison_spec import load_comparison

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
                        "general": "bundled",
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


def test_a_budget_that_is_too_small_says_what_would_be_needed(comparison_file: Path) -> None:
    comparison = load_comparison(comparison_file, ["budget=1s", "methods=[lora]"])
    with pytest.raises(SpecError, match=r"budget: 1 s leaves lora .* need"):
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
        ("seeds=0", "seeds"),
    ],
)
def test_what_makes_no_comparison_is_refused(
    comparison_file: Path, override: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        load_comparison(comparison_file, [override])


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
