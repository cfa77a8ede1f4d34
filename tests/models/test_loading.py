"""Loading by path, and one sentence for everything that cannot be loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from tiny import CHATML, tiny_llama, tiny_tokenizer
from tunesmith.errors import ModelError
from tunesmith.models.loading import load_model, load_tokenizer, locate
from tunesmith.models.precision import best_dtype
from tunesmith.models.settings import ModelSettings

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A model directory to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def message(name: str | Path | ModelSettings) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(name if isinstance(name, ModelSettings) else str(name))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_saved_model_comes_back_whole(saved: Path) -> None:
    model, tokenizer = load_model(str(saved), dtype=torch.float32)
    weights = load_file(saved / WEIGHTS)
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._name_or_path == model.name_or_path == str(saved)
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_settings_dtype_is_that_of_the_weights(saved: Path, name: str) -> None:
    settings = ModelSettings.model_validate({"name": str(saved), "dtype": name})
    assert str(load_model(settings).model.dtype) == f"torch.{name}"


def test_the_auto_dtype_is_the_best_of_the_device(saved: Path) -> None:
    assert load_model(str(saved)).model.dtype == best_dtype("cpu")


def test_float16_is_never_best() -> None:
    assert best_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert best_dtype("mps") == torch.float32


@pytest.mark.parametrize(("asked", "got"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_the_attention_of_the_settings_is_taken(saved: Path, asked: str, got: str) -> None:
    settings = ModelSettings.model_validate({"name": str(saved), "attention": asked})
    assert load_model(settings).model.config._attn_implementation == got


def test_the_tokenizer_may_come_from_elsewhere(saved: Path, tmp_path: Path) -> None:
    tiny_tokenizer("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}").save_pretrained(
        tmp_path / "other"
    )
    settings = ModelSettings(name=str(saved), tokenizer=str(tmp_path / "other"))
    loaded = load_model(settings).tokenizer
    assert loaded.chat_template == load_tokenizer(settings).chat_template != CHATML


def test_a_sharded_model_loads(directory: Path) -> None:
    model = tiny_llama()
    (directory / WEIGHTS).unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    loaded = load_model(str(directory), dtype=torch.float32).model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_path_may_start_with_the_home_directory(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert locate("~/whole", ModelSettings()) == saved


def test_truncated_weights_are_named(directory: Path) -> None:
    weights = directory / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} is damaged" in message(directory)


def test_weights_that_are_not_safetensors_are_named(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"not safetensors at all, but long enough")
    assert f"{WEIGHTS} is damaged" in message(directory)


def test_a_missing_shard_is_named(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    tiny_llama().save_pretrained(directory, max_shard_size="20KB")
    sorted(directory.glob("*.safetensors"))[0].unlink()
    assert "model-00001-of" in message(directory)


def test_missing_weights_do_not_start_random(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    assert "no weights for 1 parameters (model.layers.1.mlp.up_proj.weight, ...)" in message(
        directory
    )


def test_weights_of_another_shape_are_an_error(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "cannot be loaded as a causal language model" in message(directory)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    assert "has no config.json, so it is not a model directory" in message(tmp_path)


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it is an adapter" in message(tmp_path)


def test_a_folder_of_gguf_files_asks_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    assert f"name the GGUF file itself: {tmp_path / 'a.gguf'}" in message(tmp_path)


def test_a_broken_config_is_named(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    assert "config.json that is not JSON" in message(directory)


def test_an_unknown_architecture_is_named(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "nonesuch"}')
    assert "`nonesuch`" in message(directory)


def test_pickled_weights_are_refused(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")
    assert "only pickled weights, which can run code" in message(directory)


def test_no_weights_at_all_is_said(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    assert "has no *.safetensors file" in message(directory)


def test_a_missing_tokenizer_is_said(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert message(directory).startswith("model.tokenizer: ")


def test_a_broken_tokenizer_is_said(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"model": 1}')
    assert "no tokenizer that transformers can read" in message(directory)


def test_a_slow_tokenizer_is_refused(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(directory)
    assert "has only a slow tokenizer (ByT5Tokenizer)" in message(directory)


def test_a_path_that_is_not_there_is_said() -> None:
    for name in ("./nope", "/nope/model", "a/b/c", "nope.gguf"):
        assert message(name) == f"model.name: there is no file or directory '{name}'"


def test_a_file_that_is_no_model_is_said(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("x")
    assert "is a file and not a model directory or a .gguf file" in message(file)


def test_a_hub_name_while_offline_lists_near_zoo_names() -> None:
    text = message("someone/smollm2-135m")
    assert "'someone/smollm2-135m' is no path, and this machine is offline" in text
    assert "smollm2-135m-instruct" in text


def test_a_name_that_no_hub_model_can_have_is_said() -> None:
    assert "neither a path nor a name the Hub could have" in message("what is this?")


def test_code_in_a_model_directory_is_not_run(directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "cannot be loaded" in message(directory)
    assert not (tmp_path / "ran").exists()
