"""Several methods in one run: trained side by side, saved, loaded, evaluated, resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tunesmith import (
    CheckpointSettings,
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    LoRA,
    ModelSettings,
    PrefixTuning,
    Run,
    Source,
    TrainSettings,
)
from tunesmith.errors import MethodError
from tunesmith.jobs.train import learning_rate_scales
from tunesmith.methods.tuned import attach
from tunesmith.models.loading import load_model
from tunesmith.spec import load_run_file

METHODS = [LoRA(rank=4), PrefixTuning(length=4)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {n}" * (1 + n % 3), "completion": "yes" * n} for n in range(1, 17)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def run_of(rows: Path, model: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "name": "both",
        "output": str(rows.parent / "runs"),
        "model": ModelSettings(name=str(model), dtype="float32"),
        "method": METHODS,
        "data": DataSettings(train=[Source(path=str(rows))], holdout=4, max_length=128),
        "train": TrainSettings(max_steps=4, batch_size=4, warmup=0),
        "evaluation": EvaluationSettings(samples=1, max_new_tokens=3),
        "engine": EngineSettings(device="cpu"),
    }
    return Run(**settings | changes)


def test_both_are_trained_saved_loaded_and_evaluated(rows: Path, tiny_model: Path) -> None:
    result = tunesmith.train(run_of(rows, tiny_model))
    folders = sorted(path.name for path in result.directory.adapter.iterdir() if path.is_dir())
    assert folders == ["01-default-lora", "02-default-prefix_tuning"]
    assert result.summary["method"] == "lora+prefix_tuning"
    loaded = tunesmith.load_run(result.directory.path)
    assert [part.method for part in loaded.tuned.parts] == METHODS
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(loaded.tuned.model(ids).logits, result.tuned.model(ids).logits)
    again = tunesmith.evaluate(result.directory.path)
    assert again["tuned"]["loss"] == pytest.approx(result.summary["after"]["loss"])
    assert load_run_file(result.directory.spec).method == METHODS


def test_an_interrupted_run_resumes_to_the_same_weights(rows: Path, tiny_model: Path) -> None:
    checkpoint = CheckpointSettings(every_steps=1)
    whole = tunesmith.train(run_of(rows, tiny_model, name="whole", checkpoint=checkpoint))
    run = run_of(rows, tiny_model, checkpoint=checkpoint)

    class InterruptedRunError(RuntimeError):
        pass

    def interrupt(event: object) -> None:
        if getattr(event, "kind", "") == "step_done" and event.step == 3:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        tunesmith.train(run, listeners=[interrupt])
    resumed = tunesmith.train(run, resume=True)
    one, other = whole.tuned.state_dict(), resumed.tuned.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_each_method_learns_at_its_own_rate_unless_the_run_gives_one(
    rows: Path, tiny_model: Path
) -> None:
    run = run_of(rows, tiny_model).resolved()
    assert run.train.learning_rate is None
    tuned = attach(load_model(str(tiny_model)).model, *run.methods)
    first = run.methods[0].default_learning_rate
    rates = {name: first * s for name, s in learning_rate_scales(run, tuned).items()}
    for part in tuned.parts:
        for name in part.attachment.trainable():
            assert rates[name] == pytest.approx(part.method.default_learning_rate)
    given = run.model_copy(update={"train": TrainSettings(learning_rate=1e-3)})
    assert set(learning_rate_scales(given, tuned).values()) == {1.0}


def test_methods_that_fight_are_refused_before_anything_is_written(
    rows: Path, tiny_model: Path
) -> None:
    run = run_of(rows, tiny_model, method=[tunesmith.Full(), LoRA(rank=4)])
    with pytest.raises(MethodError, match="full and lora both train"):
        tunesmith.train(run)
    assert not run.directory.exists()
