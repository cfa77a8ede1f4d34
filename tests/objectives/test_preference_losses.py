"""The preference losses against plain float64 formulas, and against TRL's own code."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tunesmith.objectives import preference_losses as losses

H = torch.tensor([-3.0, -0.2, 0.0, 0.7, 40.0, -60.0], dtype=torch.float64)
W = torch.tensor([-0.05, -0.7, -2.0, -9.0], dtype=torch.float64)
L = torch.tensor([-1.3, -0.1, -2.0, -30.0], dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_sigmoid_is_the_formula_of_dpo_and_cdpo(eps: float) -> None:
    expected = [-(1 - eps) * log_sigmoid(0.3 * h) - eps * log_sigmoid(-0.3 * h) for h in H.tolist()]
    torch.testing.assert_close(
        losses.sigmoid(H, beta=0.3, eps=eps), torch.tensor(expected).double()
    )


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """With labels flipped at rate eps its mean is DPO's loss on the right labels."""
    eps = 0.2
    mixed = (1 - eps) * losses.robust(H, beta=0.3, eps=eps)
    mixed = mixed + eps * losses.robust(-H, beta=0.3, eps=eps)
    torch.testing.assert_close(mixed, losses.sigmoid(H, beta=0.3))


def test_ipo_and_hinge_are_their_formulas() -> None:
    torch.testing.assert_close(losses.ipo(H, beta=0.5), (H - 1.0) ** 2)
    expected = torch.tensor([max(0.0, 1 - 0.5 * h) for h in H.tolist()]).double()
    torch.testing.assert_close(losses.hinge(H, beta=0.5), expected)


def test_orpo_is_the_log_ratio_of_odds() -> None:
    odds = [math.exp(x) / -math.expm1(x) for x in (*W.tolist(), *L.tolist())]
    ratios = [odds[i] / odds[i + len(W)] for i in range(len(W))]
    expected = torch.tensor([-log_sigmoid(math.log(r)) for r in ratios]).double()
    torch.testing.assert_close(losses.orpo(W, L), expected)


def test_log1mexp_is_exact_near_both_ends_and_has_finite_gradients() -> None:
    x = torch.tensor([-1e-12, -0.5, -0.7, -50.0, 0.0], dtype=torch.float64, requires_grad=True)
    found = losses.log1mexp(x)
    expected = [math.log(1e-12), math.log1p(-math.exp(-0.5)), math.log1p(-math.exp(-0.7))]
    torch.testing.assert_close(found[:3].detach(), torch.tensor(expected).double())
    assert found[3].item() == pytest.approx(-math.exp(-50.0))
    (gradient,) = torch.autograd.grad(found[:4].sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "good", [[True, True, True], [False, False, False], [True, False, True]], ids=str
)
def test_kto_is_its_formula_with_only_good_or_only_bad_replies_too(good: list[bool]) -> None:
    ratio, z0 = torch.tensor([0.4, -1.0, 2.0]).double(), torch.tensor(0.3).double()
    weights = losses.Desirable(1.5, 0.5)
    expected = [
        1.5 * (1 - 1 / (1 + math.exp(-0.2 * (r - 0.3))))
        if g
        else 0.5 * (1 - 1 / (1 + math.exp(-0.2 * (0.3 - r))))
        for r, g in zip(ratio.tolist(), good, strict=True)
    ]
    found = losses.kto(ratio, torch.tensor(good), z0, beta=0.2, weights=weights)
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_the_reference_point_is_never_negative_and_has_no_gradient() -> None:
    below = torch.tensor([-1.0, 0.2], requires_grad=True)
    assert losses.reference_point(below).item() == 0.0
    above = losses.reference_point(torch.tensor([1.0, 0.5], requires_grad=True))
    assert above.item() == 0.75
    assert not above.requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        lambda h: losses.sigmoid(h, beta=0.3, eps=0.1),
        lambda h: losses.robust(h, beta=0.3, eps=0.1),
        lambda h: losses.ipo(h, beta=0.3),
        lambda h: losses.simpo(h, beta=2.0, gamma=0.5),
        lambda h: losses.orpo(h - 10, -h - 10),
    ],
)
def test_gradients_are_those_of_finite_differences(loss: object) -> None:
    h = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (h,))


def trl_cpo(loss_type: str, **settings: float) -> SimpleNamespace:
    own = {"alpha": 0.0, "beta": 0.7, "label_smoothing": 0.1, "simpo_gamma": 0.5}
    accelerator = SimpleNamespace(device="cpu")
    return SimpleNamespace(loss_type=loss_type, accelerator=accelerator, **(own | settings))


def test_simpo_and_cpo_are_those_of_trl() -> None:
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    compute = cpo_trainer.CPOTrainer.cpo_loss
    theirs = compute(trl_cpo("simpo"), W, L)[0]
    torch.testing.assert_close(losses.simpo(W - L, beta=0.7, gamma=0.5, eps=0.1), theirs)
    theirs = compute(trl_cpo("sigmoid"), W, L)[0]
    torch.testing.assert_close(losses.cpo(W - L, beta=0.7, eps=0.1), theirs)


def test_orpo_is_that_of_trl() -> None:
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    trainer = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    theirs: Tensor = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, W.float(), L.float())[0]
    torch.testing.assert_close(0.7 * losses.orpo(W.float(), L.float()), -theirs)
