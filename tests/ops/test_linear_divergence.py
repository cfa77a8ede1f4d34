"""The chunked divergence against the plain formula over whole logits."""

import pytest
import torch
from torch import Tensor

from tunesmith.ops.linear_divergence import LinearHead, divergence, linear_divergence

VOCAB, WIDTH, TEACHER = 23, 7, 11


def parts(tokens: int) -> tuple[Tensor, LinearHead, Tensor, LinearHead]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    hidden = drawn(tokens, WIDTH).requires_grad_(True)
    head = LinearHead(drawn(VOCAB, WIDTH).requires_grad_(True), drawn(VOCAB).requires_grad_(True))
    return hidden, head, drawn(tokens, TEACHER), LinearHead(drawn(VOCAB + 2, TEACHER), None, 3.0)


def plain(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """Sum over positions, written with probabilities instead of logarithms."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    m = beta * p + (1 - beta) * q
    if kind == "forward_kl":
        return (p * (p / q).log()).sum()
    if kind == "reverse_kl":
        return (q * (q / p).log()).sum()
    return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_value_and_gradients_are_those_of_the_whole_logits(kind: str, chunk_size: int) -> None:
    hidden, head, teacher_hidden, teacher_head = parts(9)
    settings = {"kind": kind, "beta": 0.3, "temperature": 2.0}
    found = linear_divergence(
        hidden, head, teacher_hidden, teacher_head, chunk_size=chunk_size, **settings
    )
    student = (hidden @ head.weight.T + head.bias) / 2
    teacher = 3 * torch.tanh(teacher_hidden @ teacher_head.weight[:VOCAB].T / 3) / 2
    expected = plain(student, teacher, kind, 0.3)
    torch.testing.assert_close(found, expected)
    wanted = (hidden, head.weight, head.bias)
    for own, other in zip(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_equal_distributions_have_no_divergence_and_no_gradient(kind: str) -> None:
    hidden, head, _, _ = parts(5)
    frozen = LinearHead(head.weight.detach(), head.bias.detach())
    found = linear_divergence(hidden, head, hidden.detach(), frozen, kind=kind)
    assert found.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.grad(found, hidden)[0].abs().max() < 1e-12


def test_no_positions_give_zero() -> None:
    hidden, head, teacher_hidden, teacher_head = parts(0)
    assert linear_divergence(hidden, head, teacher_hidden, teacher_head).item() == 0.0


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_generalised_js_divergence_is_that_of_trl(beta: float) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    q, p = torch.randn(1, 4, 9), torch.randn(1, 4, 9)
    theirs = trainer.generalized_jsd_loss(q, p, beta=beta, reduction="sum")
    ours = divergence(q[0].log_softmax(-1), p[0].log_softmax(-1), "js", beta).sum()
    torch.testing.assert_close(ours, theirs)


def test_a_teacher_that_rules_tokens_out_gives_no_nan() -> None:
    teacher = torch.tensor([[0.0, -torch.inf, 0.0]]).log_softmax(-1)
    student = torch.zeros(1, 3, requires_grad=True)
    found = divergence(student.log_softmax(-1), teacher, "forward_kl", 0.5).sum()
    assert found.isfinite()
    assert torch.autograd.grad(found, student)[0].isfinite().all()
