"""Distillation from a teacher that spoke once: computed before training, kept, read from a file."""

import gc
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

import tunesmith
from pairs import pair_rows, run_of, write_rows
from reply_runs import StopError, adapter, events, kill_after, train_in_two_processes
from tiny import tiny_llama, tiny_t5, tiny_tokenizer
from tunesmith import DataSettings, ModelSettings, Run, Source
from tunesmith.engine.events import Event, StepDone
from tunesmith.engine.settings import CheckpointSettings
from tunesmith.errors import CheckpointError, ModelError, SpecError
from tunesmith.jobs.align import align
from tunesmith.jobs.align_spec import load_alignment
from tunesmith.jobs.plan import plan
from tunesmith.measure.memory_plan import MemoryPlan
from tunesmith.objectives import Distillation
from tunesmith.spec import load_run_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teacher"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider model of the same tokens whose head is padded to more rows than the student's."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    wider = {"hidden_size": 48, "initializer_range": 0.2, "vocab_size": 310}
    tiny_llama(**wider).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def taught(folder: Path, model: Path, teacher: Path, /, **changes: Any) -> Run:
    """Two epochs and more over forty replies, shuffled."""
    objective = {"logits": "cached", "top_k": 300} | changes.pop("objective", {})
    settings = ModelSettings(name=str(teacher), dtype="float32")
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(48)]
    path = folder / "rows.jsonl"
    if not path.exists():
        write_rows(path, rows)
    data = {"train": [Source(path=str(path))], "holdout": 8, "max_length": 128}
    made = run_of(
        folder,
        model,
        Distillation(teacher=settings, **objective),
        data=DataSettings(**(data | changes.pop("data", {}))),
    )
    for part, values in changes.items():
        whole = getattr(made, part)
        updated = whole.model_copy(update=values) if isinstance(values, dict) else values
        made = made.model_copy(update={part: updated})
    return made


def metrics(run: Run, **options: Any) -> list[tuple[float, float]]:
    path = tunesmith.train(run, **options).directory.path
    steps = events(path, "step_done")
    evaluated = [e["metrics"]["divergence"] for e in events(path, "evaluated")]
    return [*((e["loss"], e["grad_norm"]) for e in steps), (evaluated[0], evaluated[-1])]


LAYOUTS: dict[str, dict[str, Any]] = {
    "side by side": {},
    "padded": {"engine": {"padding": "right"}},
    "packed": {"data": {"packing": True}},
    "accumulated": {"train": {"batch_size": 2, "accumulation_steps": 4, "max_steps": 12}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_all_tokens_kept_a_run_is_that_of_the_live_teacher(
    tmp_path: Path, tiny_model: Path, teacher: Path, layout: str
) -> None:
    how = {"divergence": "js", "temperature": 1.5, "label_weight": 0.2}
    settings = {"train": {"max_steps": 12}} | LAYOUTS[layout]
    live = taught(
        tmp_path,
        tiny_model,
        teacher,
        objective=how | {"logits": "live", "top_k": 64},
        name="live",
        **settings,
    )
    cached = taught(tmp_path, tiny_model, teacher, objective=how, **settings)
    assert metrics(cached) == [pytest.approx(row, rel=1e-3, abs=1e-6) for row in metrics(live)]


def test_few_tokens_of_a_distribution_teach_too(
    tmp_path: Path, tiny_model: Path, teacher: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = tunesmith.train(taught(tmp_path, tiny_model, teacher, objective={"top_k": 4}))
    before, after = result.summary["before"], result.summary["after"]
    assert 0 < after["divergence"] < before["divergence"]
    files = [load_file(path) for path in cache.glob("*")]
    assert len(files) == 2  # training and evaluation
    assert {file["tokens"].shape[1] for file in files} == {4}
    assert all(np.allclose(np.exp(file["log_probs"]).sum(1), 1, atol=1e-5) for file in files)
    positions = max(len(file["tokens"]) for file in files)
    said = f"{positions:,} positions x 4 tokens = {positions * 36 / 1024:.1f} KiB"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(("logits", "alive"), [("live", 1), ("cached", 0)])
def test_a_teacher_that_has_spoken_is_not_in_memory(
    tmp_path: Path, tiny_model: Path, teacher: Path, logits: str, alive: int
) -> None:
    seen = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            models = [one for one in gc.get_objects() if type(one) is LlamaForCausalLM]
            seen.append(sum(one.config.hidden_size == 48 for one in models))

    run = taught(tmp_path, tiny_model, teacher, objective={"logits": logits, "top_k": 64})
    tunesmith.train(run, listeners=[listen])
    assert seen == [alive] * run.train.max_steps


def test_a_run_resumes_bit_for_bit(tmp_path: Path, tiny_model: Path, teacher: Path) -> None:
    settings: dict[str, Any] = {
        "objective": {"top_k": 8},
        "train": {"max_steps": 12},  # five steps an epoch
        "checkpoint": CheckpointSettings(every_steps=4),
    }
    whole = tunesmith.train(taught(tmp_path, tiny_model, teacher, name="whole", **settings))
    run = taught(tmp_path, tiny_model, teacher, **settings)
    with pytest.raises(StopError):
        tunesmith.train(run, listeners=[kill_after(8)])
    cut = tunesmith.train(run, resume=True)
    ours, theirs = adapter(cut.directory.path), adapter(whole.directory.path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_was_kept_serves_other_runs_and_a_new_temperature_is_computed(
    tmp_path: Path, tiny_model: Path, teacher: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def computed(**objective: Any) -> int:
        run = taught(tmp_path, tiny_model, teacher, objective={"top_k": 8} | objective)
        tunesmith.train(run, overwrite=True)
        return capfd.readouterr().err.count("computing the teacher's logits")

    assert computed() == 2
    assert computed(divergence="reverse_kl", label_weight=0.5) == 0
    assert computed(temperature=2.0) == 2
    assert len(list(cache.glob("*"))) == 4


def test_a_file_that_was_cut_off_is_computed_again(
    tmp_path: Path,
    tiny_model: Path,
    teacher: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = taught(tmp_path, tiny_model, teacher, objective={"top_k": 8})
    first = metrics(run)
    kept = {path: path.read_bytes() for path in cache.glob("*")}
    for path, content in kept.items():
        path.write_bytes(content[:-40])
    assert metrics(run, overwrite=True) == first
    assert caplog.text.count("is damaged") == 2
    assert {path: path.read_bytes() for path in cache.glob("*")} == kept


def test_where_there_is_no_room_nothing_is_left_behind(
    tmp_path: Path, tiny_model: Path, teacher: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"takes .* bytes, and 1,000 are free.*lower .*top_k"):
        tunesmith.train(taught(tmp_path, tiny_model, teacher))
    assert list(cache.iterdir()) == []


def test_an_encoder_decoder_learns_from_what_was_kept(tmp_path: Path) -> None:
    for name, seed in (("student", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        tiny_t5().save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    models = tmp_path / "student", tmp_path / "teacher"
    live = taught(tmp_path, *models, objective={"logits": "live", "top_k": 64}, name="live")
    assert metrics(taught(tmp_path, *models)) == [
        pytest.approx(row, rel=1e-3, abs=1e-6) for row in metrics(live)
    ]


def test_a_finished_run_is_evaluated_on_other_rows(
    tmp_path: Path, tiny_model: Path, teacher: Path, cache: Path
) -> None:
    run = taught(tmp_path, tiny_model, teacher, objective={"top_k": 8})
    result = tunesmith.train(run)
    again = tunesmith.evaluate(result.directory.path)
    assert again["tuned"]["divergence"] == result.summary["after"]["divergence"]
    for path in cache.glob("*"):
        path.unlink()
    rows = [{"prompt": r["prompt"], "completion": r["rejected"]} for r in pair_rows(5, seed=3)]
    others = write_rows(tmp_path / "others.jsonl", rows)
    found = tunesmith.evaluate(result.directory.path, data=str(others))
    assert 0 < found["tuned"]["divergence"] < found["base"]["divergence"]
    assert len(list(cache.glob("*"))) == 1  # nobody asks about the training rows again


@pytest.mark.parametrize("logits", ["cached", "live"])
def test_general_text_has_a_models_loss_whatever_the_teacher_says_of_it(
    tmp_path: Path, tiny_model: Path, teacher: Path, logits: str
) -> None:
    settings = {"evaluation": {"general": "bundled"}, "train": {"max_steps": 1}}
    objective = {"logits": logits, "top_k": 64}
    result = tunesmith.train(taught(tmp_path, tiny_model, teacher, objective=objective, **settings))
    written = json.loads(result.directory.summary.read_text())
    assert written["general_loss"]["before"] == pytest.approx(math.log(300), rel=0.1)


def other_vocabulary(folder: Path) -> Path:
    tiny_llama().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("logits", ["live", "cached"])
def test_a_teacher_of_another_vocabulary_or_of_no_name_is_refused(
    tmp_path: Path, tiny_model: Path, logits: str
) -> None:
    objective = {"logits": logits, "top_k": 64}
    run = taught(tmp_path, tiny_model, other_vocabulary(tmp_path / "other"), objective=objective)
    with pytest.raises(SpecError, match=r"objective.teacher.name: .*other has another vocabulary"):
        tunesmith.train(run)
    run = taught(tmp_path, tiny_model, tmp_path / "nothing", objective=objective)
    with pytest.raises(ModelError, match=r"objective.teacher: .*nothing"):
        tunesmith.train(run)


def test_more_tokens_than_there_are_and_streams_are_refused(
    tmp_path: Path, tiny_model: Path, teacher: Path, cache: Path
) -> None:
    with pytest.raises(SpecError, match=r"objective.top_k: 301 tokens .* the 300 there are"):
        tunesmith.train(taught(tmp_path, tiny_model, teacher, objective={"top_k": 301}))
    streamed = taught(tmp_path, tiny_model, teacher, data={"streaming": True})
    with pytest.raises(SpecError, match=r"objective.logits: cached .* data.streaming: true"):
        tunesmith.train(streamed)
    assert not list(cache.glob("*"))


def test_settings_without_an_effect_are_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"top_k .* set logits: cached"):
        Distillation(teacher=ModelSettings(name=str(teacher)), top_k=8)


def test_a_plan_has_no_teacher_beside_the_student(
    tmp_path: Path, tiny_model: Path, teacher: Path
) -> None:
    def planned(**objective: Any) -> MemoryPlan:
        return plan(taught(tmp_path, tiny_model, teacher, objective=objective)).alone

    few, many = planned(top_k=4), planned(top_k=200)
    assert few.beside == many.beside == 0
    # Of 8 rows of 128 tokens, each known of by an int32 and a float32.
    assert many.activations - few.activations == pytest.approx(8 * 128 * 196 * 8, rel=0.01)


def test_what_a_killed_process_left_is_removed_once_nobody_writes_it(
    tmp_path: Path, tiny_model: Path, teacher: Path, cache: Path
) -> None:
    run = taught(tmp_path, tiny_model, teacher, objective={"top_k": 8}, train={"max_steps": 1})
    tunesmith.train(run)
    (path, _) = cache.glob("*")
    old, recent = (path.with_name(f".{path.name}.{name}") for name in ("old", "recent"))
    for partial in (old, recent):
        shutil.copy(path, partial)
    os.utime(old, (0, 0))
    path.unlink()
    tunesmith.train(run, overwrite=True)
    assert path.exists()
    assert recent.exists()
    assert not old.exists()


def test_the_example_tunes_a_teacher_and_a_student(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(24)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    chain = load_alignment(
        EXAMPLES / "distillation.yaml",
        [
            f"output={tmp_path}",
            f"common.model.name={tiny_model}",
            f"common.data={{train: [{{path: {path}}}], holdout: 8, max_length: 64}}",
            "common.train={max_steps: 6, batch_size: 8}",
            "common.engine.device=cpu",
            "stages.0.run.train.learning_rate=0.01",
            "stages.1.run.train={learning_rate: 0.01}",
        ],
    )
    found = align(chain, "distillation.yaml", lambda _: None)
    student = found["stages"][1]
    assert student["after"]["divergence"] < student["before"]["divergence"]
    # The processes of stages may have another cache than this test, so its files are not looked at.
    run = load_run_file(chain.directory / "student" / "run.yaml")
    assert isinstance(run.objective, Distillation)
    assert (run.objective.logits, run.objective.top_k) == ("cached", 64)
    assert run.objective.teacher.name == str(chain.directory / "teacher" / "model")


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_share_the_teachers_work_and_learn_what_one_does(
    tmp_path: Path, tiny_model: Path, teacher: Path, cache: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run = taught(tmp_path / "two", tiny_model, teacher, train={"batch_size": 4})
    train_in_two_processes(run, tmp_path / "two")
    two = {load_file(path)["tokens"].shape: load_file(path) for path in cache.glob("*")}
    for path in cache.glob("*"):
        path.unlink()
    one = metrics(taught(tmp_path / "one", tiny_model, teacher))
    assert len(two) == len(list(cache.glob("*"))) == 2
    for path in cache.glob("*"):
        alone = load_file(path)
        np.testing.assert_allclose(
            two[alone["tokens"].shape]["log_probs"], alone["log_probs"], atol=1e-5
        )
    steps = events(tmp_path / "two" / "runs" / "job", "step_done")
    assert [e["loss"] for e in steps] == pytest.approx([loss for loss, _ in one[:-1]], rel=1e-4)
