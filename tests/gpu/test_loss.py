"""The fused loss on a GPU: values and gradients of float64, odd sizes, no waiting."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.ops.linear_cross_entropy import linear_cross_entropy_and_correct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def head(tokens: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    labels = torch.randint(vocab, (tokens,), device="cuda")
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, z_loss: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    z = F.linear(h, w)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    total = F.cross_entropy(z, labels, reduction="sum")
    if z_loss is not None:
        total = total + z_loss * z.logsumexp(-1).square().sum()
    return total.detach(), *torch.autograd.grad(total, (h, w))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("softcap", "z_loss"), [(None, None), (30.0, None), (None, 1e-3)])
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(1, 64, 11), (67, 64, 1003), (640, 128, 8)])
@pytest.mark.parametrize("trains_head", [False, True])
def test_loss_and_gradients_are_those_of_float64(
    tokens: int,
    width: int,
    vocab: int,
    softcap: float | None,
    z_loss: float | None,
    *,
    trains_head: bool,
) -> None:
    hidden, weight, labels = head(tokens, width, vocab)
    weight.requires_grad_(trains_head)
    got = linear_cross_entropy_and_correct(
        hidden, weight, labels, softcap=softcap, chunk_size=50, z_loss=z_loss
    ).total
    total, by_hidden, by_weight = plain(hidden, weight, labels, softcap, z_loss)
    # Logits and their gradients are rounded to bfloat16, which keeps 8 bits.
    assert abs(float(got) - float(total)) <= 4e-3 * abs(float(total)) + 1e-2
    leaves = [hidden, weight] if trains_head else [hidden]
    gradients = torch.autograd.grad(got, leaves)
    for mine, its in zip(gradients, (by_hidden, by_weight), strict=False):
        assert relative(mine, its) < 2e-2
    assert gradients[0].dtype == torch.bfloat16


def test_nobody_waits_for_the_gpu() -> None:
    hidden, weight, labels = head(300, 64, 1003)
    weight.requires_grad_(False)

    def step() -> None:
        linear_cross_entropy_and_correct(hidden, weight, labels, all_supervised=True)[0].backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_logits_of_all_positions_never_exist_at_once() -> None:
    hidden, weight, labels = head(4096, 256, 128256)
    weight.requires_grad_(False)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy_and_correct(hidden, weight, labels, all_supervised=True)[0].backward()
    whole = 4096 * 128256 * 2
    assert torch.cuda.max_memory_allocated() - before < 0.8 * whole
