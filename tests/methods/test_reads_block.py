"""Adapters that read what the whole block puts out, on every architecture."""

import pytest
import torch
from torch import Tensor

from families import FAMILIES
from tunesmith.methods import Adapter, Compacter
from tunesmith.methods.contract import Method
from tunesmith.methods.tuned import attach

IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
METHODS = [
    Adapter(placement="pfeiffer", reads="block", bottleneck=4),
    Compacter(placement="pfeiffer", reads="block", bottleneck=8),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=["adapter", "compacter"])
def test_it_starts_as_the_base_acts_and_switches_off(family: str, method: Method) -> None:
    model = FAMILIES[family].make()
    inputs = FAMILIES[family].inputs(IDS)

    @torch.no_grad()  # T5's attention takes another kernel where it has gradients
    def logits() -> Tensor:
        return model(**inputs).logits

    base = logits()
    tuned = attach(model, method)
    assert torch.equal(logits(), base)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    assert not torch.equal(logits(), base)
    FAMILIES[family].loss(model, IDS).backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.trainable().values())
    with tuned.disabled():
        assert torch.equal(logits(), base)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_compiles_as_one_graph(family: str) -> None:
    torch._dynamo.reset()
    tuned = attach(FAMILIES[family].make(), METHODS[0])
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.1)
    inputs = FAMILIES[family].inputs(IDS)
    expected = tuned.model(**inputs).logits
    block = tuned.model.get_submodule(tuned.sites.blocks[0].path)
    block.compile(fullgraph=True, backend="aot_eager")
    # the compiler may fuse and so reorder float32 sums
    torch.testing.assert_close(tuned.model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
