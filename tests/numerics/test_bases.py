"""The matrix's cells on bases that are not float32: a float32 method trains one step."""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES
from numerics.matrix import IDS, base, cells, gradients, loss, method_of, reason, trained
from tunesmith.errors import MethodError
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.quantize import dequantise, quantise
from tunesmith.models.settings import ModelSettings


def train_one_step(family: str, method: str, model: PreTrainedModel) -> None:
    """Train `method` on `model`, whose parameters stay what they are, and check what changed."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    tuned = attach(model, method_of(method))
    tuned.model.train()
    trainable = tuned.trainable()
    before = {name: p.detach().clone() for name, p in trainable.items()}
    compute: AbstractContextManager[object] = nullcontext()
    if tuned.trains_base:
        compute = torch.autocast("cpu", torch.bfloat16)
    with compute:
        total = loss(family, tuned)
    total.backward()
    torch.optim.SGD(trainable.values(), lr=1.0).step()
    assert total.isfinite()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert any(not torch.equal(p, before[name]) for name, p in trainable.items())
    others = {n: p.dtype for n, p in tuned.model.named_parameters() if n not in trainable}
    assert others.items() <= dtypes.items()


@cells("bfloat16")
def test_a_bfloat16_base_trains_one_step(family: str, method: str) -> None:
    train_one_step(family, method, base(family).bfloat16())


@cells("nf4", where_refused=True)
def test_a_4_bit_base_trains_as_the_weights_of_its_codes(family: str, method: str) -> None:
    train_on_codes(family, method, "nf4")


@cells("int8", where_refused=True)
def test_an_8_bit_base_trains_as_the_weights_of_its_codes(family: str, method: str) -> None:
    train_on_codes(family, method, "int8")


def train_on_codes(family: str, method: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    codes = base(family)
    settings = ModelSettings.model_validate({"name": family, "quantize": kind})
    quantise(codes, settings, device="cpu")
    if reason(method, kind, family):
        with pytest.raises(MethodError, match="is quantised"):
            attach(codes, method_of(method))
        return
    plain = deepcopy(codes)
    dequantise(plain)
    torch.manual_seed(4)
    ours, theirs = (trained(attach(model, method_of(method))) for model in (codes, plain))
    theirs.load_state_dict(ours.state_dict())  # where it starts from activations, they differ
    found, expected = _gradients(family, ours), _gradients(family, theirs)
    assert found.keys() == ours.trainable().keys()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    ours.detach().zero_grad()
    train_one_step(family, method, codes)


def _gradients(family: str, tuned: TunedModel) -> dict[str, Tensor]:
    """Those after a forward without gradients, such as the evaluation before a run."""
    with torch.no_grad():
        FAMILIES[family].loss(tuned.model, IDS)
    tuned.model.train()
    return {name: g.clone() for name, g in gradients(family, tuned).items() if g is not None}
