"""The chunked head against plain PyTorch: values, gradients, edges."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.ops import chunked_head
from tunesmith.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_and_correct,
    token_log_probs,
    token_log_probs_and_correct,
    token_log_probs_and_entropy,
)
from tunesmith.types import IGNORE

TOKENS, WIDTH, VOCAB = 13, 5, 11


def head(
    tokens: int = TOKENS, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias (all requiring gradients) and labels, a third of them IGNORE."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    leaves = [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[::3] = IGNORE
    return leaves[0], leaves[1], leaves[2], labels


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, softcap: float | None
) -> Tensor:
    logits = plain_logits(hidden, weight, bias, softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
def test_loss_and_gradients_equal_those_of_pytorch(
    chunk_size: int | None, softcap: float | None
) -> None:
    hidden, weight, bias, labels = head()
    ours = linear_cross_entropy(
        hidden, weight, labels, bias=bias, chunk_size=chunk_size, softcap=softcap
    )
    plain = plain_loss(hidden, weight, bias, labels, softcap)
    torch.testing.assert_close(ours, plain)
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * plain, leaves)
    )


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), chunk_size=st.integers(1, 45), scale=st.floats(0.1, 30))
def test_no_cut_into_chunks_changes_the_loss(tokens: int, chunk_size: int, scale: float) -> None:
    hidden, weight, bias, labels = head(tokens)
    hidden = scale * hidden
    ours = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=chunk_size)
    torch.testing.assert_close(ours, plain_loss(hidden, weight, bias, labels, None))


def test_blocks_smaller_than_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked_head._BLOCK_ELEMENTS, "cpu", 2 * VOCAB)
    hidden, weight, bias, labels = head()
    ours = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=5)
    plain = plain_loss(hidden, weight, bias, labels, None)
    torch.testing.assert_close(ours, plain)
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves)
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradient_of_the_loss_passes_gradcheck(softcap: float | None) -> None:
    hidden, weight, bias, labels = head()

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, bias=b, chunk_size=3, softcap=softcap)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradient_of_log_probs_and_entropy_passes_gradcheck(softcap: float | None) -> None:
    hidden, weight, bias, labels = head()

    def values(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return token_log_probs_and_entropy(h, w, labels, bias=b, chunk_size=3, softcap=softcap)

    assert torch.autograd.gradcheck(values, (hidden, weight, bias))


def test_log_probs_and_entropy_equal_those_of_a_categorical_distribution() -> None:
    hidden, weight, bias, labels = head()
    labels = labels.clamp(min=0)
    ours = token_log_probs_and_entropy(hidden, weight, labels, bias=bias, chunk_size=4)
    plain = torch.distributions.Categorical(logits=F.linear(hidden, weight, bias))
    torch.testing.assert_close(ours.log_probs, plain.log_prob(labels))
    torch.testing.assert_close(ours.entropy, plain.entropy())


def test_log_probs_weighted_per_token_have_the_gradient_of_pytorch() -> None:
    hidden, weight, bias, labels = head()
    advantages = torch.randn(TOKENS, dtype=torch.float64)
    ours = (advantages * token_log_probs(hidden, weight, labels, bias=bias, chunk_size=4)).sum()
    losses = F.cross_entropy(
        F.linear(hidden, weight, bias), labels, ignore_index=IGNORE, reduction="none"
    )
    plain = -(advantages * losses).sum()
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves)
    )


def test_log_probs_are_zero_where_nothing_is_supervised() -> None:
    hidden, weight, _, labels = head()
    values = token_log_probs_and_entropy(hidden, weight, labels)
    ignored = labels == IGNORE
    assert values.log_probs[ignored].eq(0).all()
    assert values.entropy[ignored].eq(0).all()
    assert values.log_probs[~ignored].lt(0).all()


def test_correct_counts_supervised_positions_whose_label_has_the_largest_logit() -> None:
    hidden, weight, bias, labels = head()
    best = F.linear(hidden, weight, bias).argmax(-1)
    labels[1], labels[4] = best[1], best[4]
    ours = linear_cross_entropy_and_correct(hidden, weight, labels, bias=bias, chunk_size=3)
    assert ours.correct == (best == labels).sum()
    torch.testing.assert_close(ours.total, plain_loss(hidden, weight, bias, labels, None))
    each = token_log_probs_and_correct(hidden, weight, labels, bias=bias, chunk_size=3)
    assert each.correct == ours.correct
    torch.testing.assert_close(-each.log_probs.sum(), ours.total)
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(-each.log_probs.sum(), leaves), torch.autograd.grad(ours.total, leaves)
    )


def test_a_tie_for_the_largest_logit_counts_once() -> None:
    hidden, weight = torch.ones(4, 2), torch.ones(4, 2)
    assert linear_cross_entropy_and_correct(hidden, weight, torch.arange(4)).correct == 1


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_without_supervised_tokens_loss_and_gradients_are_zero(tokens: int) -> None:
    hidden, weight, bias, _ = head(tokens)
    labels = torch.full((tokens,), IGNORE)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_one_token_works() -> None:
    hidden, weight, bias, _ = head(1)
    labels = torch.tensor([3])
    ours = linear_cross_entropy(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(ours, plain_loss(hidden, weight, bias, labels, None))


def test_tensors_that_are_not_contiguous_change_nothing() -> None:
    hidden, weight, _, labels = head()
    strided = torch.empty(TOKENS, 2 * WIDTH, dtype=torch.float64)[:, ::2].copy_(hidden.detach())
    turned = weight.detach().T.contiguous().T
    spread = torch.stack((labels, labels), 1)[:, 0]
    torch.testing.assert_close(
        linear_cross_entropy(strided, turned, spread), linear_cross_entropy(hidden, weight, labels)
    )


def test_inputs_are_left_as_they_were() -> None:
    hidden, weight, _, labels = head()
    before = [tensor.detach().clone() for tensor in (hidden, weight, labels)]
    linear_cross_entropy(hidden, weight, labels).backward()
    assert all(map(torch.equal, (hidden, weight, labels), before))


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, bias, labels = head()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, bias=bias).backward()
    assert weight.grad is None
    assert bias.grad is not None
    assert hidden.grad is not None


def test_a_trained_weight_on_frozen_hidden_states_gets_its_gradient() -> None:
    hidden, weight, bias, labels = head()
    loss = linear_cross_entropy(hidden.detach(), weight, labels, bias=bias.detach())
    (ours,) = torch.autograd.grad(loss, weight)
    plain = torch.autograd.grad(plain_loss(hidden, weight, bias, labels, None), weight)[0]
    torch.testing.assert_close(ours, plain)


def test_without_a_graph_the_loss_is_the_same_and_has_none() -> None:
    hidden, weight, _, labels = head()
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, labels, chunk_size=4)
    assert not without.requires_grad
    assert torch.equal(without, linear_cross_entropy(hidden, weight, labels, chunk_size=4).detach())


def test_float32_gives_a_float32_loss_equal_to_that_of_pytorch() -> None:
    hidden, weight, bias, labels = head(dtype=torch.float32)
    ours = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=4)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain_loss(hidden, weight, bias, labels, None))


def test_bfloat16_is_as_close_to_float64_as_rounding_allows() -> None:
    exact = head()
    hidden, weight, bias = (leaf.detach().bfloat16().requires_grad_() for leaf in exact[:3])
    ours = linear_cross_entropy(hidden, weight, exact[3], bias=bias, chunk_size=4)
    wide = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    plain = plain_loss(*wide, exact[3], None)
    assert ours.dtype == torch.float32
    # bfloat16 keeps 8 bits: logits up to 6 are off by up to 2**-7, and so is each token's loss;
    # gradients are sums of at most 9 such terms, rounded once more.
    torch.testing.assert_close(ours.double(), plain, rtol=0, atol=9 * 2**-7)
    for ours_grad, plain_grad in zip(
        torch.autograd.grad(ours, (hidden, weight, bias)),
        torch.autograd.grad(plain, wide),
        strict=True,
    ):
        assert ours_grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours_grad.double(), plain_grad, rtol=2**-5, atol=2**-5)


def test_a_small_factor_on_the_loss_is_not_rounded_to_bfloat16() -> None:
    hidden, weight = (leaf.detach().bfloat16().requires_grad_() for leaf in head()[:2])
    labels = head()[3]
    loss = linear_cross_entropy(hidden, weight, labels)
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (third,) = torch.autograd.grad(loss / 3, hidden)
    torch.testing.assert_close(third, (whole.float() / 3).bfloat16(), rtol=0, atol=0)


def test_under_autocast_products_run_in_bfloat16_and_gradients_stay_float32() -> None:
    hidden, weight, bias, labels = head(dtype=torch.float32)
    leaves = (hidden, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_cross_entropy(hidden, weight, labels, bias=bias)
    gradients = torch.autograd.grad(mixed, leaves)
    rounded = [leaf.detach().bfloat16() for leaf in leaves]
    low = linear_cross_entropy(rounded[0], rounded[1], labels, bias=rounded[2])
    torch.testing.assert_close(mixed.detach(), low, rtol=0, atol=0)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_a_token_far_below_the_best_has_a_finite_loss() -> None:
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss == 200
    assert torch.equal(hidden.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_the_z_loss_is_its_formula_with_its_gradient(
    chunk_size: int | None, softcap: float | None
) -> None:
    hidden, weight, bias, labels = head()
    options = {"bias": bias, "chunk_size": chunk_size, "softcap": softcap, "z_loss": 0.1}
    ours = linear_cross_entropy(hidden, weight, labels, **options)
    logits = plain_logits(hidden, weight, bias, softcap)[labels != IGNORE]
    plain = plain_loss(hidden, weight, bias, labels, softcap)
    plain = plain + 0.1 * logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(ours, plain)
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * plain, leaves)
    )


def test_labels_that_nobody_looks_at_give_the_same() -> None:
    hidden, weight, bias, labels = head()
    kept = labels != IGNORE
    expected = linear_cross_entropy_and_correct(hidden, weight, labels, bias=bias)
    got = linear_cross_entropy_and_correct(
        hidden[kept], weight, labels[kept], bias=bias, all_supervised=True
    )
    torch.testing.assert_close(got, expected)
