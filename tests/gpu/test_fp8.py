"""Float8 products on a GPU that has them, against the same rounding worked out plainly."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tunesmith.errors import SetupError
from tunesmith.methods import LoRA
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.loading import load_model
from tunesmith.models.quantize import bytes_in_memory, dequantise, is_quantised, require_quantiser
from tunesmith.models.settings import ModelSettings
from tunesmith.ops.fp8_linear import CAPABILITY, fp8_linear, quantise_rows
from tunesmith.ops.turned_codes import E4M3

NO_GPU = not torch.cuda.is_available()
OLD = NO_GPU or torch.cuda.get_device_capability() < CAPABILITY
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")]
needs_float8 = pytest.mark.skipif(OLD, reason="needs a GPU of compute capability 8.9")
IDS = torch.arange(3, 27).reshape(2, 12)
# The result is rounded to bfloat16 (2^-9), and Hopper's fast accumulation of float8 keeps about
# 14 bits of a sum of products that each have 8.
CLOSE = 1e-2


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.cpu().double()).norm() / expected.norm())


@needs_float8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [(512, 1024, 768), (1, 64, 32), (77, 256, 48), (33, 90, 50), (5, 9, 7)],
)
def test_values_and_gradients_are_those_of_the_plain_products(
    rows: int, width: int, out: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    codes, scales = quantise_rows(torch.randn(out, width))
    codes = codes.view(torch.int8)
    x, grad = torch.randn(rows, width).to(dtype), torch.randn(rows, out).to(dtype)
    outcomes = []
    for device in ("cpu", "cuda"):
        given = x.to(device).requires_grad_()
        y = fp8_linear(given, codes.to(device), scales.to(device))
        (dx,) = torch.autograd.grad(y, given, grad.to(device))
        assert y.dtype == dx.dtype == dtype
        outcomes.append((y.detach().float(), dx.float()))
    (y, dx), (found, found_dx) = outcomes
    assert off(found, y) < CLOSE
    assert off(found_dx, dx) < CLOSE


@needs_float8
def test_codes_are_the_same_on_both_devices() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    (codes, scales), (own, own_scales) = quantise_rows(x), quantise_rows(x.cuda())
    torch.testing.assert_close(own_scales.cpu(), scales)
    # A quotient that lies between two codes may go to either.
    assert (own.view(torch.int8).cpu() != codes.view(torch.int8)).float().mean() < 1e-3


@pytest.fixture(params=["llama", "gpt2"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "llama":
        model = tiny_llama(hidden_size=256, intermediate_size=512, initializer_range=0.05)
    else:
        model = tiny_gpt2(n_embd=256, initializer_range=0.05)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def tuned_of(directory: Path, *, device: str = "cuda") -> TunedModel:
    """LoRA that acts, on float8 codes."""
    settings = ModelSettings.model_validate({"name": str(directory), "quantize": "fp8"})
    model = load_model(settings, device=device, dtype=torch.bfloat16).model
    torch.manual_seed(1)
    tuned = attach(model, LoRA(rank=4))
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter.device))
    return tuned


def gradients(tuned: TunedModel) -> Tensor:
    """All of them one after another, (numbers,), float32 on the CPU."""
    ids = IDS.to(tuned.model.device)
    tuned.model.train()
    tuned.model.zero_grad()
    tuned.model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten().float().cpu() for p in tuned.trainable().values()])


@needs_float8
def test_a_model_has_the_gradients_of_the_plain_products(directory: Path) -> None:
    # Other last bits of bfloat16 make other codes of the next input, a step of 2^-4 each; few do.
    assert off(gradients(tuned_of(directory)), gradients(tuned_of(directory, device="cpu"))) < 0.1


@needs_float8
def test_checkpointing_changes_nothing(directory: Path) -> None:
    tuned = tuned_of(directory)
    expected = gradients(tuned)
    tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(tuned), expected)


@needs_float8
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_have_the_gradients_of_eager_ones(
    directory: Path, checkpointing: bool
) -> None:
    tuned = tuned_of(directory)
    expected = gradients(tuned)
    layers = tuned.model.get_submodule(tuned.sites.blocks[0].path.rpartition(".")[0])
    for layer in layers.children():
        layer.compile(fullgraph=True)
    if checkpointing:
        tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    # Joined kernels keep float32 where eager ones round to bfloat16 in between.
    assert off(gradients(tuned), expected) < 0.1


@needs_float8
def test_the_base_is_kept_once_in_a_byte_a_weight(directory: Path) -> None:
    tuned = tuned_of(directory)
    gradients(tuned)
    coded = [module for module in tuned.model.modules() if is_quantised(module)]
    weights = sum(module.weight.numel() for module in coded)
    biases = sum(module.bias.nbytes for module in coded if module.bias is not None)
    assert weights < bytes_in_memory(coded) - biases < 1.05 * weights
    assert {p.device.type for p in tuned.model.parameters()} == {"cuda"}
    undo = dequantise(tuned.model)
    undo()
    assert {m.weight.view(E4M3).dtype for m in coded} == {E4M3}


@pytest.mark.skipif(NO_GPU or not OLD, reason="needs a GPU without float8")
def test_an_older_gpu_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(SetupError, match=r"compute capability 8\.9"):
        require_quantiser(ModelSettings(quantize="fp8"), "cuda")
