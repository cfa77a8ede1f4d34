"""Commands that only show something."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith.cli import main
from tunesmith.cli.comparison_table import comparison_table
from tunesmith.jobs.demo import demo_run
from tunesmith.models import zoo
from tunesmith.report.findings import Findings, FoundRow
from tunesmith.spec import load_run_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DOCS = Path(__file__).resolve().parents[2] / "docs"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data" in json.loads(said(capsys, "schema"))["properties"]


def test_the_zoo_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "minilm-l6" in said(capsys, "models")


def test_a_name_of_the_zoo_is_fetched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    monkeypatch.setattr(zoo, "_ensure", lambda entry: fetched.append(entry.name) or Path("there"))
    both = ["minilm-l6", "sentiment-4-domains/tweet"]
    assert said(capsys, "models", *both).split() == [f"{both[0]}:", "there", f"{both[1]}:", "there"]
    assert fetched == both


def test_nothing_is_fetched_where_a_name_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "_ensure", lambda entry: pytest.fail(f"{entry.name} was fetched"))
    with pytest.raises(SystemExit) as stopped:
        main(["models", "minilm-l6", "minilm-l7"])
    assert stopped.value.code == 2
    assert "the zoo has no 'minilm-l7'; the zoo has minilm-l6" in capsys.readouterr().err


def test_a_comparison_shows_names_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [FoundRow("lora[rank=8]", quality=1.0), FoundRow("lora[rank=9]", failed="no room")]
    Console(width=120).print(comparison_table(Findings("ranks[all]", "loss", False, rows, {})))
    shown = capsys.readouterr().out
    for name in ("ranks[all]", "lora[rank=8]", "lora[rank=9]"):
        assert name in shown


def test_rows_are_shown_with_their_supervised_part_marked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1?", "completion": "二"}))
    spec = tmp_path / "job.yaml"
    spec.write_text(
        f"model: {{name: {tiny_model}}}\ndata: {{train: [{{path: {tmp_path}/rows.jsonl}}]}}\n"
    )
    shown = said(capsys, "data", "show", str(spec))
    assert "⟦二<|im_end|>⟧" in shown
    assert "truncated: 0.0%" in shown


def test_the_demo_is_the_example() -> None:
    example = load_run_file(EXAMPLES / "movie-sentiment.yaml", ["name=demo"])
    assert demo_run() == example


def test_the_page_of_settings_is_up_to_date() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (DOCS / "run-files.md").read_text() == generate.page()
