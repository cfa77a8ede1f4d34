"""Low-rank products that share an operand are one product, with the same values and gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from tunesmith.engine.narrow_products import MergeNarrowProducts

WIDTH, OUT, RANK = 192, 160, 4


class Counting(MergeNarrowProducts):
    """Keeps how many products there were and are."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []

    def __call__(self, graph: Graph) -> None:
        before = _products(graph)
        super().__call__(graph)
        self.counts.append((before, _products(graph)))

    def uuid(self) -> None:
        """No cache: the pass has to run."""


def _products(graph: Graph) -> int:
    return sum(node.target is torch.ops.aten.mm.default for node in graph.nodes)


class Pairs(nn.Module):
    """Frozen maps of one input, with a low-rank pair beside each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.W = nn.ParameterList(
            nn.Parameter(torch.randn(OUT, WIDTH), requires_grad=False) for _ in range(count)
        )
        self.A = nn.ParameterList(torch.randn(RANK + i, WIDTH) for i in range(count))
        self.B = nn.ParameterList(torch.randn(OUT, RANK + i) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (WIDTH,))
        whole = zip(self.W, self.A, self.B, strict=True)
        return torch.stack([F.linear(x, W) + F.linear(F.linear(x, A), B) for W, A, B in whole])


def compiled(module: nn.Module, count: Callable[[Graph], None]) -> Callable[..., Tensor]:
    torch.compiler.reset()

    def run(*args: Tensor) -> Tensor:
        with torch._inductor.config.patch(joint_custom_pre_pass=count):
            return torch.compile(module.__call__, fullgraph=True)(*args)

    return run


def results(
    run: Callable[..., Tensor], module: nn.Module, x: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = run(x)
    out.backward(torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    return out.detach(), [x.grad, *gradients]


@pytest.mark.parametrize("shape", [(7, WIDTH), (1, 9, WIDTH)])
@pytest.mark.parametrize("count", [2, 3])
def test_pairs_on_one_input_are_one_product_with_the_same_results(
    shape: tuple[int, ...], count: int
) -> None:
    torch.manual_seed(0)
    module = Pairs(count).double()
    x = torch.randn(shape, dtype=torch.float64)
    counting = Counting()
    out, gradients = results(compiled(module, counting), module, x)
    expected, by = results(module, module, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, by)
    # Of each pair 6 products: x A and h B, and two gradients each; W has x W and its gradient by x.
    # The ones by A, the gradients of A, and what they add to that by x become one each.
    assert counting.counts == [(8 * count, 8 * count - 3 * (count - 1))]


def test_products_that_need_each_other_stay_apart() -> None:
    torch.manual_seed(0)

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = nn.Parameter(torch.randn(WIDTH, RANK))

        def forward(self, x: Tensor) -> Tensor:
            first = x @ self.A
            return x @ (self.A * first.sum())

    module = Chain().double()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    out, gradients = results(compiled(module, Counting()), module, x)
    expected, by = results(module, module, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, by)


def test_wide_products_stay_as_they_are() -> None:
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(WIDTH, OUT, bias=False) for _ in range(2)]).double()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([part(x) for part in self.parts])

    counting = Counting()
    both = Both()
    out, _ = results(compiled(both, counting), both, torch.randn(160, WIDTH).double())
    assert counting.counts[0][0] == counting.counts[0][1]
    assert out.isfinite().all()
