"""What AdapterHub saved gives AdapterHub's own logits and gradients (tests/golden)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from tunesmith.cli import main
from tunesmith.errors import AdapterError
from tunesmith.methods import UniPELT
from tunesmith.methods.adapterhub import load_adapterhub
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import attach

GOLDEN = Path(__file__).parents[1] / "golden" / "adapterhub"
REFUSED = {
    "bert-unipelt": "means over the whole sequence",
    "llama-parallel": "read the residual",
    "gpt2-prefix": "positions from 0 on",
}
READ = sorted(p.name for p in GOLDEN.glob("*-*") if p.name not in REFUSED)


def base(case: str) -> PreTrainedModel:
    name = case.partition("-")[0]
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(GOLDEN / "base" / name).eval()


def outcome(case: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / case / "outcome.safetensors")


def loss(logits: Tensor) -> Tensor:
    """The loss of make_adapterhub.py."""
    return (logits.logsumexp(-1) * torch.arange(1, logits.shape[1] + 1)).mean()


def with_config(case: str, directory: Path, **changes: object) -> Path:
    """A copy of the case with another configuration."""
    shutil.copytree(GOLDEN / case, directory)
    said = json.loads((directory / "adapter_config.json").read_text())
    said["config"] |= changes
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


@pytest.mark.parametrize("case", READ)
def test_the_logits_are_adapterhubs(case: str) -> None:
    expected = outcome(case)
    model = base(case)
    plain = model(expected["input_ids"]).logits
    tuned = load_adapterhub(model, GOLDEN / case)
    found = tuned.model(expected["input_ids"]).logits
    assert (found - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in READ if "mlp" not in case])
def test_the_gradients_are_adapterhubs(case: str, tmp_path: Path) -> None:
    expected = outcome(case)
    tuned = load_adapterhub(base(case), GOLDEN / case)
    loss(tuned.model(expected["input_ids"]).logits).backward()
    # Reading is linear, so AdapterHub's gradients read as an adapter are the gradients of ours.
    directory = tmp_path / "gradients"
    shutil.copytree(GOLDEN / case, directory)
    (directory / "pytorch_adapter.bin").unlink(missing_ok=True)
    gradients = {k[9:]: x for k, x in expected.items() if k.startswith("gradient.")}
    save_file(gradients, directory / "adapter.safetensors")
    wanted = load_adapterhub(base(case), directory).state_dict()
    for name, parameter in tuned.trainable().items():
        # The zeros around the blocks of a fused B are trained here, and do not exist there.
        exists = wanted[name] != 0
        assert exists.any()
        torch.testing.assert_close(
            parameter.grad[exists], wanted[name][exists], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("case", READ)
def test_saved_it_is_an_adapter_of_ours(case: str, tmp_path: Path) -> None:
    expected = outcome(case)
    load_adapterhub(base(case), GOLDEN / case, name="mine").save(tmp_path / "saved")
    loaded = load_adapter(base(case), tmp_path / "saved")
    found = loaded.model(expected["input_ids"]).logits
    torch.testing.assert_close(found, expected["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("case", "message"), REFUSED.items())
def test_what_computes_something_else_is_refused(case: str, message: str) -> None:
    model = base(case)
    names = list(model.state_dict())
    with pytest.raises(AdapterError, match=message):
        load_adapterhub(model, GOLDEN / case)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("bert-houlsby", {"ln_after": True}, "ln_after True"),
        ("bert-houlsby", {"leave_out": [1]}, "leave_out"),
        ("bert-houlsby", {"non_linearity": "leakyrelu"}, "non_linearity 'leakyrelu'"),
        ("bert-houlsby", {"reduction_factor": {"0": 4, "default": 2}}, "layer to layer"),
        ("bert-houlsby", {"output_adapter": False}, "no placement of ours"),
        ("bert-houlsby", {"mh_adapter": False}, "has no place in this model"),
        ("bert-houlsby", {"reduction_factor": 2}, "shape"),
        ("bert-compacter", {"shared_phm_rule": False}, "shared_phm_rule"),
        ("bert-prefix", {"use_gating": True}, "use_gating"),
        ("bert-prefix", {"prefix_length": 5}, "other sizes"),
        ("bert-prefix", {"flat": False}, "neither flat"),
        ("bert-lora-all", {"use_dora": True}, "use_dora"),
        ("gpt2-lora", {"attn_matrices": ["q"]}, "do not explain"),
        ("bert-houlsby", {"architecture": "prompt_tuning"}, "behind the norm"),
        ("bert-houlsby", {"architecture": "mtl_lora"}, "cannot be read"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(
    case: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    directory = with_config(case, tmp_path / "changed", **changes)
    with pytest.raises(AdapterError, match=message):
        load_adapterhub(base(case), directory)


class Surprise:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code in a file ran",)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "surprise"
    shutil.copytree(GOLDEN / "llama-prefix", directory)
    torch.save({"x": Surprise()}, directory / "pytorch_adapter.bin")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapterhub(base("llama"), directory)
    (directory / "pytorch_adapter.bin").write_bytes(b"broken")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapterhub(base("llama"), directory)
    assert "code in a file ran" not in capsys.readouterr().out


def test_another_architecture_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="model of type bert and this is one of type llama"):
        load_adapterhub(base("llama"), GOLDEN / "bert-houlsby")
    with pytest.raises(AdapterError, match="give the directory"):
        load_adapterhub(base("llama"), tmp_path)
    directory = tmp_path / "broken"
    shutil.copytree(GOLDEN / "llama-houlsby", directory)
    (directory / "adapter.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapterhub(base("llama"), directory)
    (directory / "adapter.safetensors").unlink()
    with pytest.raises(AdapterError, match="holds no weights"):
        load_adapterhub(base("llama"), directory)


OURS = {
    ".loras.golden.lora_": ".lora_default.",
    ".loras.golden.gate.": ".lora_default.token_gate.",
    ".prefix_tuning.prefix_gates.golden.": ".prefix_tuning_default.token_gate.",
    ".adapters.golden.gate.": ".dense.adapter_default.token_gate.",
    ".adapters.golden.adapter_down.0.": ".dense.adapter_default.down.",
    ".adapters.golden.adapter_up.": ".dense.adapter_default.up.",
    ".token_gate.weight": ".token_gate.w",
    ".token_gate.bias": ".token_gate.c",
}


def as_unipelt(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """AdapterHub's UniPELT on the tiny BERT by our names."""
    state: dict[str, Tensor] = {}
    for key, tensor in found.items():
        if "prefix_tunings" in key:
            by_layer = tensor.view(3, 2, 2, 4, 4).permute(1, 2, 3, 0, 4)
            for layer, pair in enumerate(by_layer):
                path = f"bert.encoder.layer.{layer}.attention.self.prefix_tuning_default"
                state |= {f"{path}.{x}": y for x, y in zip("KV", pair, strict=True)}
            continue
        name = key
        for theirs, ours in OURS.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    return state


def test_unipelt_on_one_token_is_adapterhubs() -> None:
    """Of one token the mean of AdapterHub's gates is the token's own, as it is here."""
    expected = outcome("bert-unipelt")
    file = GOLDEN / "bert-unipelt" / "pytorch_adapter.bin"
    values = as_unipelt(torch.load(file, weights_only=True))
    # There the gate takes the place of LoRA's alpha / r.
    tuned = attach(base("bert"), UniPELT(rank=2, alpha=2, prefix_length=3, bottleneck=4))
    tuned.load_state_dict(values)
    logits = tuned.model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-5)
    loss(logits).backward()
    gradients = {k[9:]: x for k, x in expected.items() if k.startswith("gradient.")}
    wanted = as_unipelt(gradients)
    found = {name: parameter.grad for name, parameter in tuned.trainable().items()}
    torch.testing.assert_close(found, {n: wanted[n] for n in found}, atol=1e-5, rtol=1e-4)


def test_the_command_writes_an_adapter_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imported"
    arguments = [str(GOLDEN / "bert-pfeiffer"), "--base", str(GOLDEN / "base" / "bert")]
    with pytest.raises(SystemExit, match="0"):
        main(["import-adapter", *arguments, "--out", str(out)])
    said = capsys.readouterr().out
    assert "adapter (reads block, bottleneck 4, activation relu, scale 1.0): 296 parameters" in said
    assert "written adapter loads equal" in said
    expected = outcome("bert-pfeiffer")
    found = load_adapter(base("bert"), out, check_base=False).model(expected["input_ids"]).logits
    torch.testing.assert_close(found, expected["logits"], atol=1e-5, rtol=1e-5)
    with pytest.raises(SystemExit, match=r"[1-9]"):
        main(["import-adapter", *arguments, "--out", str(out)])
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"model_type": "bert"}, "cannot be loaded: "),
        ({}, "no config that transformers knows"),
    ],
    ids=["encoder-decoder", "no weights", "no model"],
)
def test_what_is_no_base_is_named(
    tmp_path: Path, config: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = [str(GOLDEN / "bert-pfeiffer"), "--base", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"[1-9]"):
        main(["import-adapter", *arguments, "--out", str(tmp_path / "imported")])
    assert message in capsys.readouterr().err
