"""The divergence from a teacher's k likeliest tokens against the plain formula in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.ops.linear_divergence import LinearHead, linear_divergence
from tunesmith.ops.linear_divergence_top_k import TopK, linear_divergence_top_k, linear_top_k

VOCAB, WIDTH, TEACHER, BETA = 23, 7, 11, 0.3
KINDS = ("forward_kl", "reverse_kl", "js")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def student(positions: int, softcap: float | None = None) -> tuple[Tensor, LinearHead]:
    weight, bias = drawn(VOCAB, WIDTH).requires_grad_(), drawn(VOCAB).requires_grad_()
    return drawn(positions, WIDTH).requires_grad_(), LinearHead(weight, bias, softcap)


def kept(p: Tensor, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """p and q, (positions, vocab), with all but p's k largest merged into one outcome."""
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(k).indices, True)
    if k == p.shape[-1]:
        return p, q
    merged = [
        torch.cat(
            [x * inside, (x * ~inside).sum(-1, keepdim=True)],
            dim=-1,
        )
        for x in (p, q)
    ]
    return merged[0], merged[1]


def plain(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Sum over positions, written with probabilities; an outcome that neither has adds nothing."""

    def kl(one: Tensor, other: Tensor) -> Tensor:
        there = one > 0
        return (one[there] * (one[there] / other[there]).log()).sum()

    m = BETA * p + (1 - BETA) * q
    if kind == "forward_kl":
        return kl(p, q)
    return kl(q, p) if kind == "reverse_kl" else BETA * kl(p, m) + (1 - BETA) * kl(q, m)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("k", [1, 5, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_the_merged_distributions(
    kind: str, k: int, chunk_size: int | None
) -> None:
    hidden, head = student(9, softcap=2.5)
    states, other = drawn(9, TEACHER), LinearHead(drawn(VOCAB + 2, TEACHER), drawn(VOCAB + 2), 3.0)
    how: dict[str, Any] = {"vocab": VOCAB, "temperature": 1.7, "chunk_size": chunk_size}
    teacher = linear_top_k(states, other, k, **how)
    found = linear_divergence_top_k(hidden, head, teacher, kind=kind, beta=BETA, **how)

    z = 2.5 * torch.tanh((hidden @ head.weight.T + head.bias) / 2.5)
    teacher_z = 3 * torch.tanh((states @ other.weight.T + other.bias)[:, :VOCAB] / 3)
    p, q = (teacher_z / 1.7).softmax(-1), (z / 1.7).softmax(-1)
    expected = plain(*kept(p, q, k), kind)
    torch.testing.assert_close(found, expected)
    wanted = (hidden, head.weight, head.bias)
    for own, its in zip(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(own, its)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_whole_vocabulary_it_is_the_whole_divergence(kind: str) -> None:
    hidden, head = student(6)
    states, other = drawn(6, TEACHER), LinearHead(drawn(VOCAB, TEACHER), None)
    teacher = linear_top_k(states, other, VOCAB, vocab=VOCAB)
    found = linear_divergence_top_k(hidden, head, teacher, vocab=VOCAB, kind=kind, beta=BETA)
    whole = linear_divergence(hidden, head, states, other, kind=kind, beta=BETA)
    torch.testing.assert_close(found, whole)
    wanted = (hidden, head.weight, head.bias)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted), torch.autograd.grad(whole, wanted)
    )


def test_a_students_padded_rows_take_no_part() -> None:
    hidden, head = student(4)
    states, other = drawn(4, TEACHER), LinearHead(drawn(VOCAB - 3, TEACHER), None)
    teacher = linear_top_k(states, other, 5, vocab=VOCAB - 3)
    found = linear_divergence_top_k(hidden, head, teacher, vocab=VOCAB - 3)
    cut = LinearHead(head.weight[:-3], head.bias[:-3])
    assert torch.equal(found, linear_divergence_top_k(hidden, cut, teacher, vocab=VOCAB - 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0, 3000.0])
@settings(deadline=None, max_examples=15)
@given(k=st.integers(1, VOCAB), seed=st.integers(0, 10**6))
def test_merging_outcomes_never_raises_a_divergence(
    kind: str, sharpness: float, k: int, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden, head = student(3)
    states, other = drawn(3, TEACHER), LinearHead(drawn(VOCAB, TEACHER) * sharpness, None)
    teacher = linear_top_k(states, other, k, vocab=VOCAB)
    found = linear_divergence_top_k(hidden, head, teacher, vocab=VOCAB, kind=kind, beta=BETA)
    whole = linear_divergence(hidden, head, states, other, kind=kind, beta=BETA)
    assert -1e-12 <= found.item() <= whole.item() * (1 + 1e-12) + 1e-12
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, (hidden, head.weight)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_rest_on_either_side_is_no_nan(kind: str, dtype: torch.dtype) -> None:
    """Both models are as good as certain: 1 - sum_S p is 0 in float32, or less."""
    weight = torch.eye(VOCAB, dtype=dtype) * 200
    hidden = torch.eye(VOCAB, dtype=dtype)[:4].requires_grad_()
    certain = LinearHead(weight, None)
    for k in (1, 2):
        teacher = linear_top_k(hidden.detach().roll(1, 0), certain, k, vocab=VOCAB)
        assert teacher.log_probs.dtype == torch.float32
        assert teacher.log_probs.isfinite().all()
        found = linear_divergence_top_k(hidden, certain, teacher, vocab=VOCAB, kind=kind)
        assert found.dtype == torch.float32
        assert found.isfinite()
        assert found > 0
        assert torch.autograd.grad(found, hidden)[0].isfinite().all()


def test_equal_distributions_have_no_divergence_and_no_gradient() -> None:
    hidden, head = student(5)
    frozen = LinearHead(head.weight.detach(), head.bias.detach())
    teacher = linear_top_k(hidden.detach(), frozen, 3, vocab=VOCAB)
    found = linear_divergence_top_k(hidden, head, teacher, vocab=VOCAB)
    assert found.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.grad(found, hidden)[0].abs().max() < 1e-12


def test_a_hand_worked_example() -> None:
    """p = (.5, .25, .25), q = (.25, .5, .25), k = 1: .5 ln 2 + .5 ln(.5 / .75) = .1438."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    teacher = TopK(torch.tensor([[0]], dtype=torch.int32), torch.log(torch.tensor([[0.5, 0.5]])))
    head = LinearHead(torch.eye(3), None)
    assert linear_top_k(p.log(), head, 1, vocab=3).tokens.tolist() == [[0]]
    torch.testing.assert_close(
        linear_divergence_top_k(q.log(), head, teacher, vocab=3), torch.tensor(0.1438410362258904)
    )


def test_no_positions_give_zero() -> None:
    hidden, head = student(0)
    teacher = linear_top_k(drawn(0, WIDTH), head, 4, vocab=VOCAB)
    assert teacher.tokens.shape == (0, 4)
    assert linear_divergence_top_k(hidden, head, teacher, vocab=VOCAB).item() == 0.0
