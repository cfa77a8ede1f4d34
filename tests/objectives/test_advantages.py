"""Advantages and KL estimates, against examples worked by hand."""

import pytest
import torch

from tunesmith.errors import SpecError
from tunesmith.objectives.advantages import (
    AdaptiveKL,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    whitened,
)


def test_gae_is_what_was_worked_out_by_hand() -> None:
    """gamma 0.5, lambda 0.5; rewards 1, 0, 2 and values 2, 4, 1.

    delta_3 = 2 + 0 - 1 = 1;           A_3 = 1
    delta_2 = 0 + 0.5 * 1 - 4 = -3.5;  A_2 = -3.5 + 0.25 * 1 = -3.25
    delta_1 = 1 + 0.5 * 4 - 2 = 1;     A_1 = 1 + 0.25 * -3.25 = 0.1875
    The second reply ends after two: delta_2 = 3 - 1 = 2, delta_1 = 0 + 0.5 * 1 - 2 = -1.5,
    A_1 = -1.5 + 0.25 * 2 = -1.
    """
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 99.0]])
    values = torch.tensor([[2.0, 4.0, 1.0], [2.0, 1.0, 77.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = generalised_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    torch.testing.assert_close(
        found.advantages, torch.tensor([[0.1875, -3.25, 1.0], [-1.0, 2.0, 0.0]])
    )
    torch.testing.assert_close(found.returns, torch.tensor([[2.1875, 0.75, 2.0], [1.0, 3.0, 0.0]]))


def test_gae_with_lambda_1_is_the_return_less_the_value() -> None:
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    mask = torch.ones(3, 6, dtype=torch.bool)
    found = generalised_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found.returns, to_come)
    torch.testing.assert_close(found.advantages, to_come - values)


def test_whitening_sees_real_tokens_only() -> None:
    x = torch.tensor([[1.0, 3.0, 1e6], [5.0, 7.0, -1e6]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    found = whitened(x, mask)
    real = found[mask]
    torch.testing.assert_close(real.mean(), torch.tensor(0.0))
    torch.testing.assert_close(real.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert float(found[~mask].abs().sum()) == 0
    assert torch.isfinite(whitened(x[:1, :1], mask[:1, :1])).all()


def test_group_advantages_are_what_was_worked_out_by_hand() -> None:
    """Scores 1, 2, 3, 6: mean 3, squared distances 4 + 1 + 0 + 9 = 14, std sqrt(14 / 3)."""
    scores = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    centred = torch.tensor([[-2.0, -1.0, 0.0, 3.0]])
    torch.testing.assert_close(group_advantages(scores, scale="none"), centred)
    divided = centred / ((14 / 3) ** 0.5 + 1e-4)
    torch.testing.assert_close(group_advantages(scores, scale="group"), divided)
    # Of the others: 1 - (2 + 3 + 6) / 3, and so on.
    others = torch.tensor([[1 - 11 / 3, 2 - 10 / 3, 0.0, 6 - 2.0]])
    torch.testing.assert_close(leave_one_out_advantages(scores), others)


def test_the_deviation_of_the_batch_is_one_number_for_all_groups() -> None:
    scores = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    found = group_advantages(scores, scale="batch")
    torch.testing.assert_close(found[1] / found[0], torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_scores_have_advantages_of_exactly_zero(scale: str) -> None:
    scores = torch.tensor([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7]])
    assert torch.equal(group_advantages(scores, scale=scale), torch.zeros(2, 3))
    assert torch.equal(leave_one_out_advantages(scores), torch.zeros(2, 3))


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(SpecError, match="samples"):
        group_advantages(torch.zeros(3, 1), scale="none")


def test_kl_estimates_have_the_mean_that_they_promise() -> None:
    p = torch.randn(6, dtype=torch.float64).softmax(0)
    q = torch.randn(6, dtype=torch.float64).softmax(0)
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), kind=kind)).sum(), exact)
    expected = (p * (p / q).log().square() / 2).sum()
    torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), kind="k2")).sum(), expected)
    assert bool((kl_estimate(p.log(), q.log(), kind="k3") >= 0).all())
    assert bool((kl_estimate(p.log(), q.log(), kind="k2") >= 0).all())


def test_the_gradient_of_k2_is_that_of_the_kl() -> None:
    """Schulman's k2: E_p[grad (log r)^2 / 2] = grad KL(p || q)."""
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(5, dtype=torch.float64).log_softmax(0)
    log_p = z.log_softmax(0)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - q)).sum(), z, retain_graph=True)
    estimate = (log_p.detach().exp() * kl_estimate(log_p, q, kind="k2")).sum()
    (found,) = torch.autograd.grad(estimate, z)
    torch.testing.assert_close(found, exact)


def test_the_adaptive_coefficient_goes_after_its_target() -> None:
    """KL 12 at target 6: error 1, clipped to 0.2; 100 of 1000 replies make 0.1 * 1.02."""
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000.0)
    controller.update(12.0, 100)
    assert controller.coefficient == pytest.approx(0.102)
    controller.update(5.7, 100)  # error -0.05
    assert controller.coefficient == pytest.approx(0.102 * 0.995)
    fixed = AdaptiveKL(0.1)
    fixed.update(12.0, 100)
    assert fixed.coefficient == 0.1
