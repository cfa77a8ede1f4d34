"""Whole runs of a tiny model: what they leave, and that the ways to run one agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tunesmith
from tiny import tiny_llama, tiny_tokenizer
from tunesmith import (
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    Full,
    LastLayer,
    LoRA,
    ModelSettings,
    Run,
    Source,
    TrainSettings,
)
from tunesmith.engine.settings import CheckpointSettings
from tunesmith.errors import SpecError
from tunesmith.jobs.merge import merge
from tunesmith.methods.contract import Method
from tunesmith.spec import load_run_file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Prompts and replies of very different lengths."""
    path = tmp_path / "rows.jsonl"
    content = [
        {"prompt": f"Count to {n}" + "!" * (5 * n % 13), "completion": "one two three "[: 3 + n]}
        for n in range(24)
    ]
    path.write_text("\n".join(json.dumps(row) for row in content))
    return path


def run_of(folder: Path, directory: Path, **changes: object) -> Run:
    """A run of six steps over four rows each."""
    settings: dict[str, object] = {
        "name": "job",
        "output": str(folder / "runs"),
        "model": ModelSettings(name=str(directory), dtype="float32"),
        "method": LoRA(rank=4),
        "data": DataSettings(
            train=[Source(path=str(folder / "rows.jsonl"))], holdout=4, max_length=96
        ),
        "train": TrainSettings(max_steps=6, batch_size=4, learning_rate=1e-2),
        "evaluation": EvaluationSettings(samples=2, max_new_tokens=4, every_steps=3),
        "engine": EngineSettings(device="cpu"),
    }
    return Run(**(settings | changes))


def losses(directory: Path) -> list[float]:
    events = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step_done"]


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def test_a_run_leaves_everything_it_promises(tmp_path: Path, rows: Path, tiny_model: Path) -> None:
    result = tunesmith.train(run_of(tmp_path, tiny_model))
    found = {path.name for path in result.directory.path.iterdir()}
    assert found == {
        "run.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "outcomes.json",
        "samples.json",
        "summary.json",
        "report.html",
    }
    summary = json.loads(result.directory.summary.read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert all(proof["passed"] for proof in summary["proofs"])
    assert summary["trainable_parameters"] == sum(
        p.numel() for p in result.tuned.trainable().values()
    )
    assert summary["result_bytes"] > 0
    samples = json.loads(result.directory.samples.read_text())
    assert set(samples[0]) == {"prompt", "reference", "before", "after"}


def test_the_written_spec_runs_again_to_the_same_weights(
    tmp_path: Path, rows: Path, tiny_model: Path
) -> None:
    first = tunesmith.train(run_of(tmp_path, tiny_model)).directory
    again = load_run_file(first.spec, ["name=again"])
    second = tunesmith.train(again).directory
    one, other = adapter(first.path), adapter(second.path)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_run_resumes_to_the_same_weights(
    tmp_path: Path, rows: Path, tiny_model: Path
) -> None:
    checkpoint = CheckpointSettings(every_steps=2)
    whole = tunesmith.train(run_of(tmp_path, tiny_model, name="whole", checkpoint=checkpoint))
    run = run_of(tmp_path, tiny_model, checkpoint=checkpoint)

    class InterruptedRunError(RuntimeError):
        pass

    def interrupt(event: object) -> None:
        if getattr(event, "kind", "") == "step_done" and event.step == 5:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        tunesmith.train(run, listeners=[interrupt])
    resumed = tunesmith.train(run, resume=True)
    one, other = adapter(whole.directory.path), adapter(resumed.directory.path)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(whole.directory.path) == losses(resumed.directory.path)
    assert resumed.summary["before"] == whole.summary["before"]
    samples = json.loads(resumed.directory.samples.read_text())
    assert samples == json.loads(whole.directory.samples.read_text())


@pytest.mark.parametrize("method", [Full(), LastLayer(blocks=1)], ids=["full", "last_layer"])
def test_methods_that_train_the_base_come_back_as_they_were_trained(
    tmp_path: Path, rows: Path, tiny_model: Path, method: Method
) -> None:
    run = run_of(tmp_path, tiny_model, method=method)
    result = tunesmith.train(run)
    loaded = tunesmith.load_run(result.directory.path)
    ids = torch.arange(40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded.tuned.model(ids).logits, result.tuned.model(ids).logits)
        assert not torch.equal(loaded.tuned.model(ids).logits, base(ids).logits)
        with loaded.tuned.disabled():
            assert torch.equal(loaded.tuned.model(ids).logits, base(ids).logits)


def test_full_training_leaves_a_plain_model(tmp_path: Path, rows: Path, tiny_model: Path) -> None:
    result = tunesmith.train(run_of(tmp_path, tiny_model, method=Full()))
    plain = AutoModelForCausalLM.from_pretrained(result.directory.model, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, result.tuned.model(ids).logits)


@pytest.mark.parametrize("changes", [{"packing": True}, {}], ids=["packed", "side by side"])
def test_how_rows_are_laid_out_does_not_change_the_loss(
    tmp_path: Path, rows: Path, tiny_model: Path, changes: dict[str, bool]
) -> None:
    # One step over all rows, so that packing can only change the layout.
    data = DataSettings(train=[Source(path=str(rows))], max_length=192, shuffle=False, **changes)
    packed = bool(changes)
    settings = {"data": data, "evaluation": EvaluationSettings(samples=0)}
    padded_data = DataSettings(train=[Source(path=str(rows))], max_length=192, shuffle=False)
    rows_a_step = packed_rows(tiny_model, data) if packed else 24
    one = TrainSettings(max_steps=1, batch_size=rows_a_step, learning_rate=1e-2)
    all_rows = TrainSettings(max_steps=1, batch_size=24, learning_rate=1e-2)
    free = tunesmith.train(run_of(tmp_path, tiny_model, train=one, **settings))
    padded = tunesmith.train(
        run_of(
            tmp_path,
            tiny_model,
            name="padded",
            train=all_rows,
            data=padded_data,
            evaluation=settings["evaluation"],
            engine=EngineSettings(device="cpu", padding="right"),
        )
    )
    assert losses(free.directory.path) == pytest.approx(losses(padded.directory.path), abs=1e-5)


def packed_rows(tiny_model: Path, data: DataSettings) -> int:
    from tunesmith.data.prepare import prepare
    from tunesmith.models.zoo import cache_dir

    prepared = prepare(data, tiny_tokenizer(), seed=0, cache=cache_dir() / "tokens")
    assert prepared.train.rows_per_epoch is not None
    return prepared.train.rows_per_epoch


def test_early_stopping_gives_the_best_model(tmp_path: Path, rows: Path, tiny_model: Path) -> None:
    run = run_of(
        tmp_path,
        tiny_model,
        train=TrainSettings(
            max_steps=40, batch_size=4, learning_rate=2.0, schedule="constant", early_stopping=2
        ),
        evaluation=EvaluationSettings(every_steps=1, samples=0),
    )
    result = tunesmith.train(run)
    assert result.outcome.stopped_because == "early_stopping"
    assert result.outcome.best is not None
    assert result.summary["after"]["loss"] == pytest.approx(result.outcome.best.value)


def test_a_run_can_be_evaluated_on_other_data(tmp_path: Path, rows: Path, tiny_model: Path) -> None:
    # Which of its own rows a run takes says nothing of another file.
    own_rows = Source(path=str(rows), skip=2, limit=4)
    data = DataSettings(train=[Source(path=str(rows))], evaluation=[own_rows], max_length=96)
    result = tunesmith.train(run_of(tmp_path, tiny_model, data=data))
    own = tunesmith.evaluate(result.directory.path)
    assert own["tuned"] == pytest.approx(result.summary["after"])
    assert own["base"] == pytest.approx(result.summary["before"])
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "Count to 99", "completion": "no"}))
    assert tunesmith.evaluate(result.directory.path, data=str(other))["tuned"] != own["tuned"]


@pytest.mark.parametrize("method", [LoRA(rank=4), LastLayer(), Full()], ids=lambda m: m.name)
def test_merging_writes_a_model_that_any_program_loads(
    tmp_path: Path, rows: Path, tiny_model: Path, method: Method
) -> None:
    result = tunesmith.train(run_of(tmp_path, tiny_model, method=method))
    proofs = merge(result.directory.path, tmp_path / "merged")
    assert all(proof.passed for proof in proofs)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, result.tuned.model(ids).logits)


def test_python_has_the_same_names(tmp_path: Path, tiny_model: Path) -> None:
    settings = ModelSettings(name=str(tiny_model), dtype="float32")
    model, tokenizer = tunesmith.load_model(settings)
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    base = model(ids).logits
    tuned = tunesmith.attach(model, LoRA(rank=2))
    for parameter in tuned.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    trained = model(ids).logits
    tuned.save(tmp_path / "adapter")
    tuned.export_peft(tmp_path / "peft")
    with tuned.disabled():
        assert torch.equal(model(ids).logits, base)
    other, _ = tunesmith.load_model(settings)
    assert torch.equal(
        tunesmith.load_adapter(other, tmp_path / "adapter").model(ids).logits, trained
    )
    tuned.merge()
    torch.testing.assert_close(model(ids).logits, trained)


@pytest.mark.distributed
@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(
    tmp_path: Path, rows: Path, tiny_model: Path, distribution: str
) -> None:
    checkpoint = CheckpointSettings(every_steps=3)
    one = tunesmith.train(run_of(tmp_path, tiny_model, name="one", checkpoint=checkpoint))
    run = run_of(tmp_path, tiny_model, name="two", checkpoint=checkpoint)
    spec = tmp_path / "two.yaml"
    spec.write_text(run.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "tunesmith", "train", str(spec), "train.batch_size=2"]
    command += [f"engine.distribution={distribution}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "runs" / "two"
    assert losses(two) == pytest.approx(losses(one.directory.path), abs=1e-5)
    alone, together = adapter(one.directory.path), adapter(two)
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        # Adam divides by tiny second moments: rounding of 1e-8 in a gradient can show as 1e-5.
        torch.testing.assert_close(together[name], tensor, atol=2e-5, rtol=1e-4)
    summary = json.loads((two / "summary.json").read_text())
    assert summary["after"]["loss"] == pytest.approx(one.summary["after"]["loss"], abs=1e-5)


def test_a_model_of_another_family_trains_too(tmp_path: Path, rows: Path) -> None:
    from tiny import tiny_gpt2

    directory = tmp_path / "gpt2"
    tiny_gpt2().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    result = tunesmith.train(run_of(tmp_path, directory))
    assert result.summary["after"]["loss"] < result.summary["before"]["loss"]


def test_a_bfloat16_base_trains_with_float32_adapters(tmp_path: Path, rows: Path) -> None:
    directory = tmp_path / "half"
    tiny_llama().to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    for method in (LoRA(rank=4), LastLayer(), Full()):
        run = run_of(
            tmp_path,
            directory,
            name=method.name,
            method=method,
            model=ModelSettings(name=str(directory), dtype="bfloat16"),
        )
        result = tunesmith.train(run)
        assert {p.dtype for p in result.tuned.trainable().values()} == {torch.float32}
        assert result.summary["after"]["loss"] < result.summary["before"]["loss"]
        assert tunesmith.evaluate(result.directory.path)["tuned"]["loss"] == pytest.approx(
            result.summary["after"]["loss"], rel=1e-2
        )


def test_a_token_without_an_embedding_is_named(tmp_path: Path, rows: Path) -> None:
    tokenizer = tiny_tokenizer()
    used = {
        token
        for row in map(json.loads, rows.read_text().splitlines())
        for token in tokenizer(row["prompt"] + row["completion"])["input_ids"]
    } | set(range(5))
    directory = tmp_path / "few"
    tiny_llama(vocab_size=max(used)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    with pytest.raises(SpecError, match=f"makes token {max(used)} .* tokens 0 to {max(used) - 1};"):
        tunesmith.train(run_of(tmp_path, directory))
    assert not (tmp_path / "runs" / "job").exists()


def test_a_tokenizer_may_name_tokens_that_no_row_has(tmp_path: Path, rows: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    directory = tmp_path / "fewer"
    tiny_llama(vocab_size=len(tokenizer) - 1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    result = tunesmith.train(run_of(tmp_path, directory))
    assert result.summary["after"]["loss"] < result.summary["before"]["loss"]
