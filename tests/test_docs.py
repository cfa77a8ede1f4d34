"""The pages: generated ones are current, links lead somewhere, commands and YAML are understood."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from tunesmith.cli import app
from tunesmith.data.settings import DataSettings
from tunesmith.engine.settings import (
    CheckpointSettings,
    EngineSettings,
    EvaluationSettings,
    TrainSettings,
)
from tunesmith.jobs.align_spec import JudgedSettings, OnlineSettings, load_alignment
from tunesmith.jobs.comparison_spec import checked, load_comparison
from tunesmith.models.settings import ModelSettings
from tunesmith.objectives import PPO, Classification, Distillation
from tunesmith.objectives.sampling import Rollout
from tunesmith.settings import Settings
from tunesmith.spec import load_run_file

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


SECTIONS: dict[str, tuple[type[Settings], ...]] = {
    "model": (ModelSettings,),
    "data": (DataSettings,),
    "train": (TrainSettings,),
    "evaluation": (EvaluationSettings,),
    "checkpoint": (CheckpointSettings,),
    "engine": (EngineSettings,),
    "objective": (PPO, Classification, Distillation),
    "rollout": (Rollout,),
    "judged": (JudgedSettings,),
    "online": (OnlineSettings,),
}
"""Settings by the first word of their dotted names."""
SETTING = re.compile(rf"`(?:objective\.)?({'|'.join(SECTIONS)})\.([a-z_]+)(?:`|:|=)")


def commands(text: str) -> list[str]:
    """What is written to be typed: indented lines, and comments of run files."""
    lines = re.sub(r"\\\n#? *", "", text).splitlines()
    typed = (re.match(r"(?: {4}|# {3})(tunesmith .+)", line) for line in lines)
    return [found[1] for found in typed if found]


COMMANDS = [
    (path.name, command)
    for path in [*PAGES, *EXAMPLES, *sorted((ROOT / "examples" / "methods").glob("*.yaml"))]
    for command in commands(path.read_text(encoding="utf-8"))
]


def test_generated_pages_are_current() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()
    for name, text in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, (
            f"docs/{name} is not current: run python docs/generate.py"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"\b(?:docs|examples|bench|tests|src)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    for section, name in SETTING.findall(page.read_text(encoding="utf-8")):
        known = {field for settings in SECTIONS[section] for field in settings.model_fields}
        assert name in known, f"{page.name} names {section}.{name}"


def test_the_defaults_in_the_table_of_ppo_are_its_defaults() -> None:
    text = (ROOT / "docs" / "alignment.md").read_text(encoding="utf-8")
    table = text.partition("| detail | setting | default |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[1:]]
    told = {
        name: value
        for _, names, values in rows
        for name, value in zip(re.findall(r"`([\w.]+)`", names), values_in(values), strict=False)
    }
    assert {"kl", "clip", "lam", "missing_end_penalty", "train.eps"} < told.keys()
    own = set(PPO.model_fields) - {"name", "rewards", "rollout", "epochs"}
    assert own <= told.keys(), "the table leaves a setting of ppo out"
    for name, value in told.items():
        section, _, field = name.rpartition(".")
        (settings,) = SECTIONS[section] if section else (PPO,)
        expected = as_told(settings.model_fields[field].default)
        assert value == expected if isinstance(expected, str) else float(value) == expected, name


def as_told(default: object) -> object:
    """Return a default as the tables have it: switches and what is left out in words."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "off" if default is None or default == "none" else default


def values_in(cell: str) -> list[str]:
    """Return the values of a cell, without thousands separators, remarks and units."""
    bare = re.sub(r"(?<=\d),(?=\d{3})", "", re.sub(r"\([^)]*\)", "", cell))
    return [part.split()[0] for part in bare.split(",") if part.strip()]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_are_ones(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    found = typer.main.get_command(app)
    context = found.make_context("tunesmith", list(words), resilient_parsing=False)
    while hasattr(found, "commands"):
        name, found, rest = found.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = found.make_context(name, rest, parent=context)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_run_a_comparison_or_a_chain(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "stages" in values:
        assert load_alignment(path).name == path.stem
        return
    if "run" not in values:
        assert load_run_file(path).name == path.stem
        return
    comparison = load_comparison(path)
    assert [comparison.run_of(row, path).name for row in comparison.rows()]


def test_the_comparison_in_choosing_is_one() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    comparison = checked(yaml.safe_load(block), source="choosing.md")
    source = ROOT / "examples" / "here.yaml"
    titles = [comparison.run_of(variant, source).name for variant in comparison.rows()]
    assert titles == ["lora", "ia3", "full", "dora", "lora-wide"]
