"""Two states of one model, compared."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from tiny import tiny_llama
from tunesmith.measure.parity import logit_parity

IDS = torch.tensor([[5, 6, 7, 8]])


@contextmanager
def shifted(model: PreTrainedModel, by: float) -> Iterator[None]:
    """All logits raised by a constant."""
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output + by)
    yield
    hook.remove()


def test_one_state_equals_itself_bit_for_bit_and_the_mode_stays() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    parity = logit_parity(model, IDS, nullcontext(), nullcontext())
    assert parity.difference == 0
    assert parity.within(0)
    assert model.training


def test_the_largest_difference_is_found_and_judged_by_the_logits() -> None:
    model = tiny_llama()
    parity = logit_parity(model, IDS, shifted(model, 10.0), shifted(model, 10.5))
    with torch.no_grad():
        expected = (model(IDS).logits + 10).abs().max()
    assert abs(parity.difference - 0.5) < 1e-5
    assert abs(parity.largest - expected) < 1e-5
    assert parity.within(0.06)
    assert not parity.within(0.04)
