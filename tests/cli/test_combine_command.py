"""`tunesmith combine`: several saved adapters to one, without the base's weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny import VOCAB, tiny_llama
from tunesmith.cli import main
from tunesmith.methods import IA3, LoRA
from tunesmith.methods.contract import Method
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.loading import load_model


def adapter(tiny_model: Path, directory: Path, method: Method) -> Path:
    """Save an adapter of the tiny model that does something."""
    tuned = attach(load_model(str(tiny_model), dtype=torch.float32).model, method)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save(directory)
    return directory


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of the tiny model."""
    return (
        adapter(tiny_model, tmp_path / "a", LoRA(rank=4)),
        adapter(tiny_model, tmp_path / "b", LoRA(rank=2, targets=["attention.q", "mlp.down"])),
    )


def base(tiny_model: Path) -> TunedModel:
    return TunedModel(load_model(str(tiny_model), dtype=torch.float32).model)


def logits(tuned: TunedModel) -> Tensor:
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    return tuned.model(ids % tuned.model.config.vocab_size).logits


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [[], ["--method", "svd", "--rank", "3"], ["--method", "ties", "--density", "0.5"]]
)
def test_the_file_is_the_combination_in_memory(
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    saved: tuple[Path, Path],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    a, b = saved
    tuned = base(tiny_model)
    tuned.load_adapter("a", a)
    tuned.load_adapter("b", b)
    settings = dict(zip([o[2:] for o in options[::2]], options[1::2], strict=True))
    kept = tuned.combine(
        {"a": 0.7, "b": -0.3},
        name="ab",
        method=settings.get("method", "linear"),  # type: ignore[arg-type]
        rank=int(settings["rank"]) if "rank" in settings else None,
        density=float(settings["density"]) if "density" in settings else None,
    )
    tuned.use("ab")
    shown = said(
        capsys, "combine", f"{a}=0.7", f"{b}=-0.3", "--out", str(tmp_path / "ab"), *options
    )
    assert f"keeps {kept:.1%} of the combined change" in shown
    loaded = base(tiny_model)
    loaded.load_adapter("ab", tmp_path / "ab")
    torch.testing.assert_close(logits(loaded), logits(tuned))


def test_a_directory_without_a_weight_counts_once(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    said(capsys, "combine", *map(str, saved), "--out", str(tmp_path / "ab"))
    together = base(tiny_model)
    for name, directory in zip("ab", saved, strict=True):
        together.load_adapter(name, directory)
    loaded = load_adapter(load_model(str(tiny_model), dtype=torch.float32).model, tmp_path / "ab")
    torch.testing.assert_close(logits(loaded), logits(together), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_base_is_refused(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tiny_llama(num_hidden_layers=1)
    attach(other, LoRA(rank=2)).save(tmp_path / "c")
    said_ = refused(
        capsys, "combine", str(saved[0]), str(tmp_path / "c"), "--out", str(tmp_path / "x")
    )
    assert "was made on a llama model of other sizes" in said_
    assert not (tmp_path / "x").exists()


def test_what_is_no_lora_is_refused(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    other = adapter(tiny_model, tmp_path / "c", IA3())
    found = refused(capsys, "combine", str(saved[0]), str(other), "--out", str(tmp_path / "x"))
    assert "is ia3, whose effect is no sum of low-rank deltas" in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{a}=much"], "'much' is no weight; write DIR=NUMBER"),
        (["{a}=nan"], "must be finite"),
        (["{a}=1", "{a}=2"], "is named twice"),
        (["{a}", "--method", "mean"], "'mean' is no method"),
        (["{a}", "--density", "0.5"], "density has no effect on linear"),
        (["gone=1"], "holds no adapter"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    saved: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    asked = [argument.format(a=saved[0]) for argument in arguments]
    error = refused(capsys, "combine", *asked, "--out", str(tmp_path / "x"))
    assert error.startswith("error: ")
    assert words in error


def test_adapters_that_do_not_say_their_base_want_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    model = tiny_llama(vocab_size=259)
    model.name_or_path = ""
    attach(model, LoRA(rank=2)).save(tmp_path / "a")
    arguments = ["combine", str(tmp_path / "a"), "--out", str(tmp_path / "x")]
    assert "give --base" in refused(capsys, *arguments)
