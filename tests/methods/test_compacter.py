"""Compacter: the paper's equations in float64, one A for all, sizes, refusals."""

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tiny import tiny_gpt2, tiny_llama
from tunesmith.errors import MethodError
from tunesmith.methods import Compacter
from tunesmith.methods.compacter import KroneckerSum, SharedA
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]


def papers_weight(linear: KroneckerSum, A: Tensor) -> Tensor:
    """W = sum_i A_i (x) (s_i t_i), (in, out) in float64 (eq. 4 and 6), written out."""
    s, t = linear.s.detach().double(), linear.t.detach().double()
    return sum(torch.kron(A[i].detach().double(), s[i] @ t[i]) for i in range(len(A)))


@pytest.mark.parametrize("rank", [1, 2])
def test_the_output_is_the_papers_formula(rank: int) -> None:
    shared = SharedA(3)
    module = Compacter(products=3, rank=rank, bottleneck=6, activation="tanh").module(12, shared)
    for parameter in (shared.A, *module.parameters()):
        nn.init.normal_(parameter)
    module.double()
    shared.double()
    h = torch.randn(4, 5, 12, dtype=torch.float64)
    down, up = (papers_weight(linear, shared.A) for linear in (module.down, module.up))
    expected = h + torch.tanh(h @ down + module.down.bias) @ up + module.up.bias
    torch.testing.assert_close(module.act(nn.Identity(), (), h), expected)


def test_gradients_are_right() -> None:
    shared = SharedA(2).double()
    linear = KroneckerSum(4, 6, shared, rank=1).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, shared.A, linear.s, linear.t, linear.bias)
    assert torch.autograd.gradcheck(lambda x, *_: linear(x), inputs)


def test_one_a_serves_all_layers_and_is_saved_once(
    trained: Trained, input_ids: Tensor, loss: Loss
) -> None:
    model = tiny_llama()
    tuned = trained(attach(model, Compacter(bottleneck=8)))
    shared = [name for name in tuned.trainable() if name.endswith(".A")]
    assert shared == ["model.compacter_default.A"]
    loss(model, input_ids).backward()
    together = model.model.compacter_default.A.grad.clone()
    # the sum of what each layer alone would give
    alone = torch.zeros_like(together)
    for path, child in tuned.attachments[0].children.items():
        if path == "model.compacter_default":
            continue
        own = SharedA(4)
        own.A.data.copy_(model.model.compacter_default.A)
        before = [(linear, linear._shared) for linear in (child.down, child.up)]
        for linear, _ in before:
            linear._shared = (own,)
        loss(model, input_ids).backward()
        alone += own.A.grad
        for linear, kept in before:
            linear._shared = kept
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("placement", "count"), [("houlsby", 2), ("pfeiffer", 1)])
def test_an_adapter_trains_few_parameters(placement: str, count: int) -> None:
    n, k, d, blocks = 4, 32, 8, 2
    tuned = attach(tiny_gpt2(), Compacter(placement=placement, bottleneck=d))
    # s and t of both maps have n (k / n) and n (d / n) elements; then the biases, and A once
    each = 2 * (k + d) + d + k
    assert tuned.parameter_counts().trainable == blocks * count * each + n**3


def test_the_papers_t5_base_has_its_share_of_parameters() -> None:
    # table 1: 0.073 % of 222.9 million for Compacter and 0.047 % for Compacter++, norms included
    shared = SharedA(4)
    adapter = Compacter(bottleneck=24).module(768, shared)
    each = sum(p.numel() for p in adapter.parameters())
    norms = (2 * 12 + 3 * 12 + 2) * 768
    compacter = 48 * each + 64 + norms
    assert each == 2 * (768 + 24) + 24 + 768
    assert compacter / 222.9e6 == pytest.approx(0.00073, rel=0.02)


def test_the_start_is_glorot_and_small() -> None:
    shared = SharedA(16)
    linear = KroneckerSum(1024, 256, shared, rank=1)
    assert shared.A.std().item() == pytest.approx(0.01, rel=0.1)
    assert linear.s.abs().max().item() == pytest.approx((2 * 6 / (64 + 1)) ** 0.5, rel=0.01)
    assert linear.t.abs().max().item() == pytest.approx((2 * 6 / (16 + 1)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Compacter(products=5, bottleneck=10), "5 does not divide the model's width 32"),
        (Compacter(bottleneck=6), "4 does not divide the bottleneck 6"),
        (Compacter(products=5), "5 does not divide the model's width 32"),
        (Compacter(reduction_factor=33), "33 leaves nothing of the model's width 32"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(method: Compacter, message: str) -> None:
    model = tiny_llama()
    names = list(model.state_dict())
    with pytest.raises(MethodError, match=message):
        attach(model, method)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("width", "method", "size"),
    [
        (576, Compacter(), 20),  # SmolLM2's: 576 / 32 = 18, which 4 does not divide
        (768, Compacter(), 24),
        (576, Compacter(products=8), 24),
        (48, Compacter(products=16, reduction_factor=3), 16),
        (32, Compacter(), 4),
    ],
)
def test_a_bottleneck_that_nobody_set_is_a_multiple_of_the_products(
    width: int, method: Compacter, size: int
) -> None:
    module = method.module(width, SharedA(method.products))
    assert module.down(torch.randn(1, width)).shape == (1, size)
    assert module.act(nn.Identity(), (), torch.randn(1, width)).shape == (1, width)


def test_the_default_attaches_to_any_width_that_the_products_divide(input_ids: Tensor) -> None:
    model = tiny_llama(hidden_size=72)  # 72 / 32 = 2
    before = model(input_ids).logits
    tuned = attach(model, Compacter())
    assert torch.equal(model(input_ids).logits, before)
    assert len(tuned.attachments[0].children) == 1 + 2 * 2


def test_two_sizes_are_refused() -> None:
    with pytest.raises(ValidationError, match="set one of them"):
        Compacter(bottleneck=4, reduction_factor=8)


def test_a_taken_name_is_refused() -> None:
    tuned = attach(tiny_llama(), Compacter(bottleneck=8))
    with pytest.raises(MethodError, match="an adapter named 'default' is already attached"):
        attach(tuned, Compacter(bottleneck=8))
    attach(tuned, Compacter(bottleneck=8), name="second")
