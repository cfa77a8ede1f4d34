"""The matrix: every method of the union on every family, cell by cell.

A cell holds, or `REASONS` names the mathematics by which it cannot; a reason that is not needed
fails as well. A method joins the matrix by being in the union.
"""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES, VOCAB
from tunesmith.errors import MethodError
from tunesmith.methods import MethodUnion
from tunesmith.methods.child import base_parameters
from tunesmith.methods.contract import Method
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.attention import enable_segments

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "lora": {"rank": 4},
    "bitfit": {"add_missing": True},
    "adapter": {"bottleneck": 4},
    "compacter": {"bottleneck": 8},
    "adalora": {"rank": 4, "target_rank": 2},
    "vera": {"rank": 8},
    "prefix_tuning": {"length": 3},
    "p_tuning_v2": {"length": 3},
    "llama_adapter": {"length": 3, "layers": 2},
}
"""Sizes for models of width 32, and what a method needs to exist at all."""

ANY: Final = "any family"
_KEYS = "keys and values besides the text's are no weight of the model"
_NO_BIAS = "the linear maps have no bias that could take up the added one"
_NONLINEAR = "an activation lies between the two maps, so no weight is equal to both"
_FUSED = "PEFT's layout has a factor for every output of a fused projection, ones for the queries"
REASONS: Final[dict[tuple[str, str, str], str]] = {
    ("adapter", "merge", ANY): _NONLINEAR,
    ("bitfit", "merge", "gemma"): _NO_BIAS,
    ("bitfit", "merge", "llama"): _NO_BIAS,
    ("bitfit", "merge", "phi3"): _NO_BIAS,
    ("bitfit", "merge", "qwen3"): _NO_BIAS,
    ("compacter", "merge", ANY): _NONLINEAR,
    ("ia3", "size", "gpt2"): _FUSED,
    ("ia3", "size", "gpt_neox"): _FUSED,
    ("ia3", "size", "phi3"): _FUSED,
    ("llama_adapter", "merge", ANY): _KEYS,
    ("p_tuning_v2", "merge", ANY): _KEYS,
    ("p_tuning_v2", "start", ANY): "keys near zero take their share of the attention",
    ("prefix_tuning", "merge", ANY): _KEYS,
    ("prefix_tuning", "start", ANY): "it is the base with the prefix's tokens in its context",
    ("prompt_tuning", "merge", ANY): "rows besides the text's are no weight of the model",
    ("prompt_tuning", "start", ANY): "it is the base with the prompt's tokens in its context",
}
"""Why a method's cell is what it is, where that is not the promise of all methods."""

METHODS: Final[list[type[Method]]] = list(get_args(get_args(MethodUnion)[0]))
CELLS: Final = [
    pytest.param(family, method, id=f"{method.model_fields['name'].default}-{family}")
    for method in METHODS
    for family in FAMILIES
]
cells = pytest.mark.parametrize(("family", "kind"), CELLS)


@cache
def _base(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family]()


def base(family: str) -> PreTrainedModel:
    """A fresh copy of the family's model; always the same weights."""
    return deepcopy(_base(family))


def method_of(kind: type[Method]) -> Method:
    return kind(**SETTINGS.get(kind.model_fields["name"].default, {}))


def tuned_of(family: str, kind: type[Method]) -> TunedModel:
    return attach(base(family), method_of(kind))


def trained(tuned: TunedModel) -> TunedModel:
    """Give every trainable a random change, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tuned


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


IDS: Final = tokens(2, 6)


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return model(**inputs or {"input_ids": IDS}).logits


def loss(tuned: TunedModel) -> Tensor:
    """The mean loss with the method's penalty; random gates draw the same each time."""
    torch.manual_seed(3)
    total = tuned.model(input_ids=IDS, labels=IDS).loss
    penalty = tuned.penalty()
    return total if penalty is None else total + penalty


def gradients(tuned: TunedModel) -> dict[str, Tensor | None]:
    tuned.model.zero_grad()
    loss(tuned).backward()
    return {name: p.grad for name, p in tuned.model.named_parameters()}


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """What `generate` makes of rows of unequal length: ids, mask, positions."""
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((length - len(row),), 2), row]) for row in rows])
    mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def packed(rows: list[Tensor]) -> dict[str, Any]:
    lengths = [len(row) for row in rows]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


ROWS: Final = [tokens(length, seed=length) for length in (2, 7, 5)]


def reason(kind: type[Method], cell: str, family: str) -> str | None:
    name = kind.model_fields["name"].default
    return REASONS.get((name, cell, family)) or REASONS.get((name, cell, ANY))


@cells
def test_start_is_the_base_bitwise(family: str, kind: type[Method]) -> None:
    tuned = tuned_of(family, kind)
    same = torch.equal(logits(tuned.model), logits(_base(family)))
    assert same == tuned.identity_at_start == (reason(kind, "start", family) is None)


@cells
def test_gradients_reach_every_trainable_and_nothing_else(family: str, kind: type[Method]) -> None:
    tuned = trained(tuned_of(family, kind))
    tuned.model.train()
    trainable = tuned.trainable()
    before = {n: p.clone() for n, p in base_parameters(tuned.model).items() if n not in trainable}
    found = gradients(tuned)
    assert {name for name, gradient in found.items() if gradient is not None} == set(trainable)
    assert [name for name in trainable if not found[name].any()] == []
    torch.optim.SGD(trainable.values(), lr=0.1).step()
    assert all(torch.equal(tuned.model.get_parameter(name), p) for name, p in before.items())


@cells
def test_off_and_detached_are_the_base_bitwise(family: str, kind: type[Method]) -> None:
    own = _base(family)
    tuned = trained(tuned_of(family, kind))
    assert not torch.equal(logits(tuned.model), logits(own))
    assert list(base_parameters(tuned.model)) == [name for name, _ in own.named_parameters()]
    with tuned.disabled():
        assert torch.equal(logits(tuned.model), logits(own))
    detached = tuned.detach()
    assert torch.equal(logits(detached), logits(own))
    assert list(detached.state_dict()) == list(own.state_dict())


@cells
def test_saved_and_loaded_is_the_same_bitwise(
    family: str, kind: type[Method], tmp_path: Path
) -> None:
    tuned = trained(tuned_of(family, kind))
    tuned.save(tmp_path / "adapter")
    loaded = load_adapter(base(family), tmp_path / "adapter")
    assert torch.equal(logits(loaded.model), logits(tuned.model))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    numbers = sum(p.numel() for p in tuned.trainable().values())
    more = sum(tensor.numel() for tensor in stored) > numbers
    assert more == (reason(kind, "size", family) is not None)


@cells
def test_merged_is_unmerged(family: str, kind: type[Method]) -> None:
    tuned = trained(tuned_of(family, kind))
    unmerged = logits(tuned.model)
    if reason(kind, "merge", family):
        with pytest.raises(MethodError):
            tuned.merge()
        assert torch.equal(logits(tuned.model), unmerged)
        return
    tuned.merge()
    torch.testing.assert_close(logits(tuned.model), unmerged, atol=1e-5, rtol=1e-5)
    tuned.unmerge()
    assert torch.equal(logits(tuned.model), unmerged)
    tuned.detach()
    assert torch.equal(logits(tuned.model), logits(_base(family)))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@cells
def test_gradient_checkpointing_gives_the_same_gradients(family: str, kind: type[Method]) -> None:
    tuned = trained(tuned_of(family, kind))
    tuned.model.train()
    plain = {name: g.clone() for name, g in gradients(tuned).items() if g is not None}
    tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = {name: g for name, g in gradients(tuned).items() if g is not None}
    torch.testing.assert_close(again, plain)


@cells
def test_left_padding_changes_nothing(family: str, kind: type[Method]) -> None:
    model = trained(tuned_of(family, kind)).model
    together = logits(model, **left_padded(ROWS))
    for row, out in zip(ROWS, together, strict=True):
        alone = logits(model, input_ids=row[None])[0]
        torch.testing.assert_close(out[-len(row) :], alone, atol=1e-5, rtol=1e-5)


@cells
def test_packing_changes_nothing(family: str, kind: type[Method]) -> None:
    model = trained(tuned_of(family, kind)).model
    assert enable_segments(model)
    alone = torch.cat([logits(model, input_ids=row[None]) for row in ROWS], dim=1)
    together = logits(model, **packed(ROWS))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@cells
def test_cached_generation_is_the_full_forward_step_by_step(
    family: str, kind: type[Method]
) -> None:
    model = trained(tuned_of(family, kind)).model
    batch = left_padded(ROWS)
    got = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=20,
        do_sample=False,
        use_cache=True,
    )
    rows = ROWS
    for _ in range(20):
        last = logits(model, **left_padded(rows), use_cache=False, logits_to_keep=1)[:, -1]
        rows = [torch.cat([r, t[None]]) for r, t in zip(rows, last.argmax(-1), strict=True)]
    assert torch.equal(got, left_padded(rows)["input_ids"])


@cells
def test_a_bfloat16_base_trains_one_step(family: str, kind: type[Method]) -> None:
    tuned = attach(base(family).bfloat16(), method_of(kind))
    tuned.model.train()
    trainable = tuned.trainable()
    before = {name: p.detach().clone() for name, p in trainable.items()}
    compute: AbstractContextManager[object] = nullcontext()
    if tuned.trains_base:
        compute = torch.autocast("cpu", torch.bfloat16)
    with compute:
        total = loss(tuned)
    total.backward()
    torch.optim.SGD(trainable.values(), lr=1.0).step()
    assert total.isfinite()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert any(not torch.equal(p, before[name]) for name, p in trainable.items())
    others = {p.dtype for n, p in tuned.model.named_parameters() if n not in trainable}
    assert others <= {torch.bfloat16}


def test_every_reason_is_of_a_method_in_the_union() -> None:
    names = {method.model_fields["name"].default for method in METHODS}
    assert {name for name, _, _ in REASONS} <= names
    assert set(SETTINGS) <= names
