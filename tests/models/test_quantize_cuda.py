"""What only a CUDA device shows of quantised bases: its own kernels, and where weights go."""

from pathlib import Path

import pytest
import torch

from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tunesmith.methods import LoRA
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.loading import load_model
from tunesmith.models.quantize import bytes_in_memory, dequantise, is_quantised
from tunesmith.models.settings import ModelSettings

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
kinds = pytest.mark.parametrize("kind", ["nf4", "int8"])
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(params=["llama", "gpt2"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "llama":
        model = tiny_llama(hidden_size=256, intermediate_size=512, initializer_range=0.05)
    else:
        model = tiny_gpt2(n_embd=256, initializer_range=0.05)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def tuned_of(directory: Path, kind: str, *, dtype: torch.dtype, plain: bool = False) -> TunedModel:
    """LoRA that acts, on the codes or on the weights that they stand for."""
    settings = ModelSettings.model_validate({"name": str(directory), "quantize": kind})
    model = load_model(settings, device="cuda", dtype=dtype).model
    if plain:
        dequantise(model)
    torch.manual_seed(1)
    tuned = attach(model, LoRA(rank=4))
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter.device))
    return tuned


def gradients(tuned: TunedModel) -> torch.Tensor:
    """All of them after a forward without gradients, one after another, (numbers,)."""
    ids = IDS.cuda()
    with torch.no_grad():
        tuned.model(input_ids=ids)
    tuned.model.train()
    tuned.model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in tuned.trainable().values()])


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantised_model(
    directory: Path, kind: str, dtype: torch.dtype
) -> None:
    found = gradients(tuned_of(directory, kind, dtype=dtype))
    expected = gradients(tuned_of(directory, kind, dtype=dtype, plain=True))
    # int8 rounds the inputs as well, here also in training; bfloat16 rounds every sum.
    close = 1e-4 if (kind, dtype) == ("nf4", torch.float32) else 5e-2
    assert (found - expected).norm() < close * expected.norm()


@kinds
def test_everything_is_on_the_device_and_smaller(directory: Path, kind: str) -> None:
    tuned = tuned_of(directory, kind, dtype=torch.bfloat16)
    quantised = [module for module in tuned.model.modules() if is_quantised(module)]
    before = bytes_in_memory(quantised)
    assert {p.device.type for p in tuned.model.parameters()} == {"cuda"}
    undo = dequantise(tuned.model)
    assert bytes_in_memory(quantised) > 1.8 * before
    undo()
    assert bytes_in_memory(quantised) == before


@kinds
def test_unmerging_gives_the_logits_of_before(directory: Path, kind: str) -> None:
    tuned = tuned_of(directory, kind, dtype=torch.bfloat16)
    ids = IDS.cuda()
    with torch.no_grad():
        before = tuned.model(input_ids=ids).logits
        with tuned.merged() as merged:
            assert (merged(input_ids=ids).logits - before).norm() < 0.05 * before.norm()
        assert torch.equal(tuned.model(input_ids=ids).logits, before)
