"""Whole runs of a tiny model: what they leave, and that the ways to run one agree."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import tunesmith
from reply_runs import StopError, events, kill_after, train_in_two_processes
from tiny import VOCAB, tiny_llama, tiny_tokenizer
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
from tunesmith.engine.checkpoint import checkpoint_of, load_trainable
from tunesmith.engine.events import Evaluated, Event, RunFinished, Warned
from tunesmith.engine.settings import CheckpointSettings
from tunesmith.errors import SpecError
from tunesmith.jobs import proofs
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


def trained(directory: Path) -> dict[str, torch.Tensor]:
    whole = directory / "model" / "model.safetensors"
    return load_file(whole) if whole.exists() else adapter(directory)


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


def test_a_run_interrupted_in_its_last_evaluation_leaves_all_when_it_resumes(
    tmp_path: Path, rows: Path, tiny_model: Path
) -> None:
    whole = tunesmith.train(run_of(tmp_path, tiny_model, name="whole"))
    run = run_of(tmp_path, tiny_model)

    def interrupt(event: object) -> None:
        if getattr(event, "kind", "") == "evaluated" and event.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    assert tunesmith.train(run, listeners=[interrupt]).outcome.stopped_because == "interrupted"
    resumed = tunesmith.train(run, resume=True)
    assert resumed.summary["after"] == whole.summary["after"]
    for file in ("outcomes", "samples"):
        ours, theirs = getattr(resumed.directory, file), getattr(whole.directory, file)
        assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


@pytest.mark.parametrize(
    ("every_steps", "holdout", "said"),
    [(None, 4, "set evaluation.every_steps"), (3, 0, "no evaluation rows")],
)
def test_early_stopping_that_could_never_stop_is_refused(
    tmp_path: Path, rows: Path, tiny_model: Path, every_steps: int | None, holdout: int, said: str
) -> None:
    run = run_of(
        tmp_path,
        tiny_model,
        data=DataSettings(train=[Source(path=str(rows))], holdout=holdout, max_length=96),
        train=TrainSettings(max_steps=6, early_stopping=1),
        evaluation=EvaluationSettings(every_steps=every_steps),
    )
    with pytest.raises(SpecError, match=f"train.early_stopping: .*{said}"):
        tunesmith.train(run)
    assert not run.directory.exists()


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


@pytest.mark.parametrize("method", [Full, LastLayer])
def test_a_run_may_keep_no_base(
    tmp_path: Path, rows: Path, tiny_model: Path, method: type[Full | LastLayer]
) -> None:
    result = tunesmith.train(run_of(tmp_path, tiny_model, method=method(keep_base=False)))
    assert result.summary["after"]["loss"] < result.summary["before"]["loss"]
    with pytest.raises(SpecError, match="use --no-base"):
        tunesmith.evaluate(result.directory.path)
    found = tunesmith.evaluate(result.directory.path, base=False)["tuned"]
    assert found["loss"] == pytest.approx(result.summary["after"]["loss"])


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


@pytest.mark.parametrize("harm", [lambda p: os.truncate(p / "trainable.safetensors", 9), rmtree])
def test_where_the_best_checkpoint_is_damaged_the_best_of_the_others_is_the_result(
    tmp_path: Path, rows: Path, tiny_model: Path, harm: Callable[[Path], None]
) -> None:
    train = TrainSettings(
        max_steps=40, batch_size=4, learning_rate=2.0, schedule="constant", early_stopping=2
    )
    run = run_of(
        tmp_path,
        tiny_model,
        train=train,
        evaluation=EvaluationSettings(every_steps=1, samples=0),
        checkpoint=CheckpointSettings(every_steps=1, keep=9),
    )
    losses: dict[int, float] = {}

    def spoil(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step > 0:
            losses[event.step] = event.metrics["loss"]
        elif isinstance(event, RunFinished):
            harm(checkpoint_of(run.directory, min(losses, key=losses.__getitem__)))

    result = tunesmith.train(run, listeners=[spoil])
    best, second = sorted(losses, key=losses.__getitem__)[:2]
    assert second != result.outcome.steps
    assert result.summary["after"]["loss"] == pytest.approx(losses[second])
    saved = load_trainable(checkpoint_of(run.directory, second))
    torch.testing.assert_close(result.tuned.state_dict(), saved, rtol=0, atol=0)
    page = result.directory.report.read_text()
    assert f"step-{best:08d}: " in page
    assert f"the result is {checkpoint_of(run.directory, second)}" in page


def test_where_no_evaluation_gave_a_number_the_last_model_is_taken_with_a_warning(
    tmp_path: Path, rows: Path, tiny_model: Path
) -> None:
    run = run_of(
        tmp_path,
        tiny_model,
        train=TrainSettings(
            max_steps=9, batch_size=4, learning_rate=1e20, warmup=0, early_stopping=1
        ),
        evaluation=EvaluationSettings(every_steps=1, samples=0),
    )
    heard: list[Event] = []
    result = tunesmith.train(run, listeners=[heard.append])
    assert (result.outcome.stopped_because, result.outcome.steps) == ("early_stopping", 1)
    assert result.outcome.best is None
    (warned,) = [event for event in heard if isinstance(event, Warned)]
    assert warned.step == 1
    assert warned.message.startswith("evaluation.best: loss was no number in any evaluation")
    assert warned.message.endswith("the result is the model after the last step")
    page = result.directory.report.read_text()
    assert warned.message in page


def test_a_run_that_diverged_leaves_files_that_every_program_reads(
    tmp_path: Path, rows: Path, tiny_model: Path
) -> None:
    train = TrainSettings(max_steps=2, batch_size=4, learning_rate=1e20, warmup=0)
    directory = tunesmith.train(run_of(tmp_path, tiny_model, train=train)).directory
    tunesmith.evaluate(directory.path)
    found = {
        path.stem: json.loads(path.read_text(), parse_constant=pytest.fail)
        for path in directory.path.glob("*.json")
    }
    assert found["summary"]["after"]["loss"] is None
    assert found["evaluation"]["metrics"]["tuned"]["loss"] is None
    assert set(found["outcomes"]["loss"]["totals"]) == {None}
    for line in directory.metrics.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


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


def test_full_training_of_a_mixture_of_experts_ends(tmp_path: Path, rows: Path) -> None:
    """Its files name each expert's weights, and the model in memory has those of all in one."""
    directory = tmp_path / "mixture"
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        pad_token_id=2,
    )
    MixtralForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    result = tunesmith.train(run_of(tmp_path, directory, method=Full()))
    proofs = {proof["name"]: proof["passed"] for proof in result.summary["proofs"]}
    assert proofs["saved model reads back equal"]
    ids = torch.arange(40)[None]
    plain = AutoModelForCausalLM.from_pretrained(result.directory.model, dtype=torch.float32)
    loaded = tunesmith.load_run(result.directory.path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.tuned.model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("method", [LoRA(rank=4), LastLayer(), Full()], ids=lambda m: m.name)
def test_what_trained_in_float32_merges_into_a_bfloat16_base(
    tmp_path: Path, rows: Path, method: Method
) -> None:
    directory = tmp_path / "half"
    tiny_llama().to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    settings = ModelSettings(name=str(directory), dtype="bfloat16")
    result = tunesmith.train(run_of(tmp_path, directory, method=method, model=settings))
    proofs = merge(result.directory.path, tmp_path / "merged")
    assert all(proof.passed for proof in proofs)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert plain.dtype == torch.bfloat16


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
@pytest.mark.parametrize(
    ("distribution", "method"),
    [("ddp", LoRA(rank=4)), ("fsdp", LoRA(rank=4)), ("fsdp", Full())],
    ids=["ddp", "fsdp", "fsdp-full"],
)
def test_two_processes_train_what_one_trains(
    tmp_path: Path, rows: Path, tiny_model: Path, distribution: str, method: Method
) -> None:
    # One sample and one batch of evaluation: the second process has neither.
    evaluation = EvaluationSettings(samples=1, max_new_tokens=4, every_steps=3)
    settings = {
        "method": method,
        "checkpoint": CheckpointSettings(every_steps=3),
        "evaluation": evaluation,
    }
    one = tunesmith.train(run_of(tmp_path, tiny_model, name="one", **settings))
    run = run_of(tmp_path, tiny_model, name="two", **settings)
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
    alone, together = trained(one.directory.path), trained(two)
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        # Adam divides by tiny second moments: rounding of 1e-8 in a gradient can show as 1e-5.
        torch.testing.assert_close(together[name], tensor, atol=2e-5, rtol=1e-4)
    summary = json.loads((two / "summary.json").read_text())
    assert summary["after"]["loss"] == pytest.approx(one.summary["after"]["loss"], abs=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("sound", [True, False])
def test_two_processes_warn_once_of_a_damaged_checkpoint_and_go_on_alike(
    tmp_path: Path, rows: Path, tiny_model: Path, sound: bool
) -> None:
    checkpoint = CheckpointSettings(every_steps=1, keep=9)
    run = run_of(tmp_path, tiny_model, checkpoint=checkpoint)
    with pytest.raises(StopError):
        tunesmith.train(run, listeners=[kill_after(3)])
    damaged = [checkpoint_of(run.directory, step) for step in ((3,) if sound else (1, 2, 3))]
    for path in damaged:
        os.truncate(path / "trainable.safetensors", 9)
    said = train_in_two_processes(run, tmp_path, "--resume")
    # The console breaks its lines.
    assert "".join(said.split()).count("steppedoverthedamagedcheckpoint") == len(damaged)
    warned = [event["message"] for event in events(run.directory, "warned")]
    assert sum(message.startswith("stepped over") for message in warned) == len(damaged)
    begun = events(run.directory, "run_started")[-1]
    assert begun["resumed_from"] == (str(checkpoint_of(run.directory, 2)) if sound else None)
    assert json.loads((run.directory / "summary.json").read_text())["steps"] == 6


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


@pytest.mark.parametrize(("device", "passes"), [("cpu", False), ("cuda", True)])
def test_a_start_at_the_base_is_exact_but_for_the_order_of_a_gpus_sums(
    device: str, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.999999, 1.0])
    monkeypatch.setattr(proofs, "_loss", lambda *_: next(losses))
    tuned = SimpleNamespace(parts=[], keeps_base=True, disabled=nullcontext)
    program = SimpleNamespace(model=SimpleNamespace(device=torch.device(device)))
    assembled = SimpleNamespace(tuned=tuned, program=program, autocast_dtype=None)
    assert proofs.starts_at_base(cast(Any, assembled), [], cast(Any, None)).passed == passes
