"""The matrix: every method of the union on every family, cell by cell.

A cell holds, or `REASONS` names the mathematics by which it cannot; a reason that is not needed
fails as well.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES
from numerics import matrix
from numerics.matrix import (
    CELLS,
    IDS,
    METHODS,
    ROWS,
    base,
    cells,
    gradients,
    own,
    reason,
    trained,
    tuned_of,
)
from numerics.reasons import ANY, REASONS, SETTINGS
from tunesmith.errors import MethodError
from tunesmith.methods.child import base_parameters
from tunesmith.methods.storage import load_adapter
from tunesmith.models.attention import enable_segments


def logits(family: str, model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return matrix.logits(model, **FAMILIES[family].inputs(ids))


@cells("attach", where_refused=True)
def test_it_attaches_or_refuses_and_leaves_the_base(family: str, method: str) -> None:
    model = base(family)
    if reason(method, "attach", family):
        with pytest.raises(MethodError):
            matrix.attach(model, matrix.method_of(method))
        assert list(model.state_dict()) == list(own(family).state_dict())
        assert torch.equal(logits(family, model), logits(family, own(family)))
    else:
        assert matrix.attach(model, matrix.method_of(method)).trainable()


@cells("start", where_refused=True)
def test_start_is_the_base_bitwise(family: str, method: str) -> None:
    tuned = tuned_of(family, method)
    same = torch.equal(logits(family, tuned.model), logits(family, own(family)))
    assert same == tuned.identity_at_start == (reason(method, "start", family) is None)


@cells("gradients")
def test_gradients_reach_every_trainable_and_nothing_else(family: str, method: str) -> None:
    tuned = trained(tuned_of(family, method))
    tuned.model.train()
    trainable = tuned.trainable()
    before = {n: p.clone() for n, p in base_parameters(tuned.model).items() if n not in trainable}
    found = gradients(family, tuned)
    assert {name for name, gradient in found.items() if gradient is not None} == set(trainable)
    assert [name for name in trainable if not found[name].any()] == []
    torch.optim.SGD(trainable.values(), lr=0.1).step()
    assert all(torch.equal(tuned.model.get_parameter(name), p) for name, p in before.items())


@cells("off")
def test_off_and_detached_are_the_base_bitwise(family: str, method: str) -> None:
    expected = logits(family, own(family))
    tuned = trained(tuned_of(family, method))
    assert not torch.equal(logits(family, tuned.model), expected)
    assert list(base_parameters(tuned.model)) == [
        name for name, _ in own(family).named_parameters()
    ]
    with tuned.disabled():
        assert torch.equal(logits(family, tuned.model), expected)
    detached = tuned.detach()
    assert torch.equal(logits(family, detached), expected)
    assert list(detached.state_dict()) == list(own(family).state_dict())


@cells("saved")
def test_saved_and_loaded_is_the_same_bitwise(family: str, method: str, tmp_path: Path) -> None:
    tuned = trained(tuned_of(family, method))
    tuned.save(tmp_path / "adapter")
    loaded = load_adapter(base(family), tmp_path / "adapter")
    assert torch.equal(logits(family, loaded.model), logits(family, tuned.model))


@cells("size", where_refused=True)
def test_the_file_holds_only_what_was_trained(family: str, method: str, tmp_path: Path) -> None:
    tuned = trained(tuned_of(family, method))
    tuned.save(tmp_path / "adapter")
    files = (tmp_path / "adapter").rglob("*.safetensors")
    stored = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    more = stored > sum(p.numel() for p in tuned.trainable().values())
    assert more == (reason(method, "size", family) is not None)


@cells("merge", where_refused=True)
def test_merged_is_unmerged(family: str, method: str) -> None:
    tuned = trained(tuned_of(family, method))
    unmerged = logits(family, tuned.model)
    if reason(method, "merge", family):
        with pytest.raises(MethodError):
            tuned.merge()
        assert torch.equal(logits(family, tuned.model), unmerged)
        return
    tuned.merge()
    torch.testing.assert_close(logits(family, tuned.model), unmerged, atol=1e-5, rtol=1e-5)
    tuned.unmerge()
    assert torch.equal(logits(family, tuned.model), unmerged)
    tuned.detach()
    assert torch.equal(logits(family, tuned.model), logits(family, own(family)))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@cells("checkpointing")
def test_gradient_checkpointing_gives_the_same_gradients(family: str, method: str) -> None:
    tuned = trained(tuned_of(family, method))
    tuned.model.train()
    plain = {name: g.clone() for name, g in gradients(family, tuned).items() if g is not None}
    tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = {name: g for name, g in gradients(family, tuned).items() if g is not None}
    torch.testing.assert_close(again, plain)


@cells("padding")
def test_padding_changes_nothing(family: str, method: str) -> None:
    model = trained(tuned_of(family, method)).model
    together = matrix.logits(model, **FAMILIES[family].padded(ROWS))
    for row, out in zip(ROWS, together, strict=True):
        alone = logits(family, model, row[None])[0]
        found = FAMILIES[family].tokens(out, len(row))
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@cells("packing", where_refused=True)
def test_packing_changes_nothing(family: str, method: str) -> None:
    model = trained(tuned_of(family, method)).model
    possible = reason(method, "packing", family) is None
    assert enable_segments(model) == possible
    if possible:
        alone = torch.cat([logits(family, model, row[None]) for row in ROWS], dim=1)
        together = matrix.logits(model, **FAMILIES[family].packed(ROWS))
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@cells("generation")
def test_cached_generation_is_the_full_forward_step_by_step(family: str, method: str) -> None:
    model = trained(tuned_of(family, method)).model
    expected = FAMILIES[family].step_by_step(model, ROWS)
    assert torch.equal(FAMILIES[family].generated(model, ROWS), expected)


def test_every_reason_names_what_there_is() -> None:
    families = {ANY, "decoder", "encoder", "seq2seq", *FAMILIES}
    for method, cell, family in REASONS:
        assert method in {ANY, *METHODS}
        assert cell in CELLS
        assert family in families
    assert set(SETTINGS) <= set(METHODS)
