"""Bad input: exit code 2, one clear message, no traceback, nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tunesmith.cli import main

Call = Callable[..., str]
ROW = {"prompt": "Say yes", "completion": "yes"}


@pytest.fixture
def spec(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file that works, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(ROW) for _ in range(6)))
    path = tmp_path / "job.yaml"
    settings = {
        "model": {"name": str(tiny_model)},
        "method": {"name": "lora", "rank": 2},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 64},
        "train": {"max_steps": 2, "batch_size": 2},
        "engine": {"device": "cpu"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], spec: Path) -> Call:
    """Calls the command line, which has to refuse; returns what it says."""

    def call(*arguments: str, leaves_nothing: bool = True) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        said = capsys.readouterr()
        assert stopped.value.code == 2, said
        assert "Traceback" not in said.err + said.out
        progress, _, message = said.err.partition("error: ")
        assert "error" not in progress
        if leaves_nothing:
            assert not (spec.parent / "runs").exists()
        return message.strip()

    return call


def run(*arguments: str) -> None:
    """Call the command line, which has to succeed."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0


def test_a_missing_run_file(refused: Call) -> None:
    assert "none.yaml: no such run file" in refused("train", "none.yaml")


def test_a_run_file_that_is_no_mapping(refused: Call, spec: Path) -> None:
    spec.write_text("- a\n- b\n")
    assert "job.yaml:1: expected a mapping" in refused("train", str(spec))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.train.0.path=gone.jsonl", ["gone.jsonl"]),
        ("model.name=smolm2-135m-instruct", ["model.name", "smollm2-135m-instruct"]),
        ("model.name=someone/some-model", ["model.name", "someone/some-model", "offline"]),
        ("method.name=lorra", ["method.name", "'lorra'", "lora"]),
        ("method.rnk=3", ["method.rnk", "unknown key", "'rank'"]),
        ("method.rank=0", ["method.rank", "0"]),
        ("method.rank=33", ["method.rank", "33", "at most"]),
        ("method.targets=[qkv]", ["method.targets", "'qkv'", "attention.q"]),
        ("data.train.0.path=someone/some-data", ["someone/some-data", "cannot be reached"]),
    ],
)
def test_a_wrong_setting_is_named(
    refused: Call, spec: Path, override: str, parts: list[str]
) -> None:
    message = refused("train", str(spec), override)
    for part in parts:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["rows.jsonl", "empty"]),
        (json.dumps(ROW) + "\n{broken\n", ["rows.jsonl", "2"]),
        (json.dumps({"foo": 1, "bar": 2}), ["foo", "bar", "alpaca", "sharegpt", "messages"]),
        (
            json.dumps({"messages": [{"role": "user", "content": "hi"}]}),
            ["rows.jsonl", "row 1", "assistant"],
        ),
    ],
)
def test_a_bad_data_file_is_named_with_its_row(
    refused: Call, spec: Path, content: str, parts: list[str]
) -> None:
    (spec.parent / "rows.jsonl").write_text(content)
    message = refused("train", str(spec))
    for part in parts:
        assert part in message


def test_a_bad_row_can_be_skipped(spec: Path) -> None:
    rows = spec.parent / "rows.jsonl"
    rows.write_text(rows.read_text() + "\n{broken\n")
    run("train", str(spec), "data.on_bad_row=skip")
    summary = json.loads((spec.parent / "runs" / "job" / "summary.json").read_text())
    assert summary["data"]["train"]["bad"] == 1


def test_a_run_directory_that_exists(refused: Call, spec: Path) -> None:
    run("train", str(spec))
    before = (spec.parent / "runs" / "job" / "summary.json").read_text()
    message = refused("train", str(spec), leaves_nothing=False)
    assert "--resume" in message
    assert "--overwrite" in message
    assert (spec.parent / "runs" / "job" / "summary.json").read_text() == before


def test_a_folder_that_is_no_run_is_never_overwritten(refused: Call, spec: Path) -> None:
    precious = spec.parent / "runs" / "job" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    message = refused("train", str(spec), "--overwrite", leaves_nothing=False)
    assert "no run directory" in message
    assert precious.read_text() == "years of work"


def test_resuming_with_other_settings(refused: Call, spec: Path) -> None:
    run("train", str(spec))
    message = refused("train", str(spec), "method.rank=4", "--resume", leaves_nothing=False)
    assert "method.rank" in message


def test_an_adapter_for_another_base(refused: Call, spec: Path, tmp_path: Path) -> None:
    from tiny import tiny_llama, tiny_tokenizer

    run("train", str(spec))
    other = tmp_path / "other"
    tiny_llama(hidden_size=64, num_attention_heads=4).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    run_file = spec.parent / "runs" / "job" / "run.yaml"
    settings = yaml.safe_load(run_file.read_text())
    settings["model"]["name"] = str(other)
    run_file.write_text(yaml.safe_dump(settings))
    message = refused("eval", "runs/job", leaves_nothing=False)
    assert "adapter" in message
    assert "other" in message


def test_a_damaged_adapter(refused: Call, spec: Path) -> None:
    run("train", str(spec))
    weights = spec.parent / "runs" / "job" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "adapter_model.safetensors" in refused("eval", "runs/job", leaves_nothing=False)


def test_a_damaged_model(refused: Call, spec: Path, tiny_model: Path) -> None:
    copy = spec.parent / "damaged"
    shutil.copytree(tiny_model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors" in refused("train", str(spec), f"model.name={copy}")


def test_a_folder_that_is_no_run_cannot_be_evaluated(refused: Call) -> None:
    assert "no run directory" in refused("eval", "nowhere")


def test_merging_never_overwrites(refused: Call, spec: Path) -> None:
    run("train", str(spec))
    target = spec.parent / "merged"
    target.mkdir()
    (target / "mine.txt").write_text("x")
    message = refused("merge", "runs/job", "--to", str(target), leaves_nothing=False)
    assert "not empty" in message
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
