"""docs/methods.md and examples/methods have every method, and what they say validates."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from tunesmith.methods import MethodUnion
from tunesmith.spec import load_run_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
NAMES = [m.model_fields["name"].default for m in get_args(get_args(MethodUnion)[0])]
HEADINGS = ("Idea", "Equation", "When", "When not", "Cost", "Paper")


def section(name: str) -> str:
    """The part of the page about one method."""
    found = re.search(rf"^### .*\(`{name}`\)$(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/methods.md has no section of {name}"
    return found[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_explained(name: str) -> None:
    text = section(name)
    assert [word for word in HEADINGS if f"**{word}.**" not in text] == []
    assert re.search(rf"── {name} ", PAGE), "it is not in the family tree"


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_of_every_section_is_a_runs_method(name: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", section(name), re.DOTALL)
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {{train: [{{path: rows.jsonl}}]}}\n{block}")
    assert load_run_file(file).method.name == name
    assert set(yaml.safe_load(block)) == {"method"}


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_run_file_that_validates(name: str) -> None:
    run = load_run_file(ROOT / "examples" / "methods" / f"{name}.yaml")
    assert run.method.name == name
    assert run.resolved().train.learning_rate == run.method.default_learning_rate


def test_there_is_no_run_file_of_something_else() -> None:
    assert {file.stem for file in (ROOT / "examples" / "methods").glob("*")} == set(NAMES)
