"""The fused loss of a chunk against PyTorch's cross-entropy, its gradient, and eager code."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.ops.loss_by_logits import fused_loss_by_logits, loss_by_logits

cases = pytest.mark.parametrize("softcap", [None, 3.0])


def logits(rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    return 4 * torch.randn(rows, 11, dtype=dtype), torch.randint(11, (rows,))


@cases
@pytest.mark.parametrize("z_loss", [None, 0.1])
def test_loss_and_gradient_are_those_of_autograd(
    softcap: float | None, z_loss: float | None
) -> None:
    raw, labels = logits()
    raw.requires_grad_()
    z = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    expected = F.cross_entropy(z, labels, reduction="sum")
    if z_loss is not None:
        expected = expected + z_loss * z.logsumexp(-1).square().sum()
    done = loss_by_logits(raw.detach(), labels, softcap, z_loss)
    torch.testing.assert_close(done.total, expected.detach())
    torch.testing.assert_close(done.gradient, torch.autograd.grad(expected, raw)[0])
    assert int(done.correct) == int((z.argmax(-1) == labels).sum())


def test_of_equal_logits_the_first_is_the_largest() -> None:
    raw = torch.zeros(2, 3)
    assert int(loss_by_logits(raw, torch.tensor([0, 1]), None, None).correct) == 1


def test_logits_far_apart_stay_finite() -> None:
    raw = torch.tensor([[1e4, 0.0, -1e4]])
    done = loss_by_logits(raw, torch.tensor([2]), None, None)
    assert float(done.total) == pytest.approx(2e4)
    torch.testing.assert_close(done.gradient, torch.tensor([[1.0, 0.0, -1.0]]))


@pytest.mark.slow
@cases
def test_one_graph_gives_the_same_for_every_number_of_rows(softcap: float | None) -> None:
    torch.compiler.reset()
    for rows in (7, 5, 1, 9):
        raw, labels = logits(rows, torch.bfloat16)
        stance = "fail_on_recompile" if rows == 9 else "default"
        with torch.compiler.set_stance(stance):
            done = fused_loss_by_logits(raw.clone(), labels, softcap, 0.01)
        expected = loss_by_logits(raw, labels, softcap, 0.01)
        torch.testing.assert_close(tuple(done), tuple(expected))
