"""Three small steps of the real run, beside what its plan says."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tiny import tiny_llama
from tunesmith import DataSettings, ModelSettings, Run, Source, TrainSettings
from tunesmith.cli import app
from tunesmith.engine.settings import EngineSettings
from tunesmith.errors import SpecError
from tunesmith.jobs.plan import plan
from tunesmith.jobs.probe import has_weights, probe
from tunesmith.methods import LoRA

CPU = torch.device("cpu")


def run_of(folder: Path, *, max_length: int = 256) -> Run:
    """One whose activations outweigh what a process gains and loses by itself."""
    tiny_llama(hidden_size=256, intermediate_size=768).config.save_pretrained(folder)
    return Run(
        model=ModelSettings(name=str(folder), dtype="float32"),
        method=LoRA(),
        data=DataSettings(train=[Source(path="nowhere.jsonl")], max_length=max_length),
        train=TrainSettings(batch_size=16),
        engine=EngineSettings(device="cpu"),
    )


@pytest.fixture
def _measurable() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a step is measured through Linux's /proc")


@pytest.mark.usefixtures("_measurable")
def test_three_steps_are_taken_and_come_near_the_plan(tmp_path: Path) -> None:
    probed = probe(plan(run_of(tmp_path), device="cpu"))
    assert [step.length for step in probed.steps] == [32, 64, 128]
    assert not probed.real_weights
    assert probed.steps[-1].activations > probed.steps[0].activations
    longest = probed.steps[-1]
    # The process of a test suite gains and frees memory besides; bench/results/plan.md has what
    # a process of its own takes.
    assert longest.planned.alone.peak / longest.peak == pytest.approx(1, abs=0.25)
    assert probed.peak == pytest.approx(probed.planned.alone.peak, rel=0.25)


@pytest.mark.usefixtures("_measurable")
def test_the_command_prints_what_was_planned_and_measured(tmp_path: Path) -> None:
    run_of(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"model: {{name: {tmp_path}}}\nmethod: {{name: lora}}\n"
        "data: {train: [{path: nowhere.jsonl}], max_length: 64}\n"
    )
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "run.yaml"), "--device=cpu", "--probe"])
    assert done.exit_code == 0, done.output
    assert "three steps of 4 rows with random weights" in done.output
    assert "Activations grow by" in done.output
    assert "At 64 tokens:" in done.output


def test_weights_are_used_where_they_are_there(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert not has_weights(run)
    tiny_llama(hidden_size=256, intermediate_size=768).save_pretrained(tmp_path)
    assert has_weights(run)


def test_what_cannot_be_probed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="rows of 32 tokens are too short"):
        probe(plan(run_of(tmp_path, max_length=32), device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_probe_of_a_gpu_needs_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no GPU here"):
        probe(plan(run_of(tmp_path), device="cuda"))
