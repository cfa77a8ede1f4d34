"""Several methods on one model: in either order they merge, save and load as they act."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith import (
    IA3,
    AdaLoRA,
    Adapter,
    BitFit,
    DiffPruning,
    Full,
    LastLayer,
    LoRA,
    PrefixTuning,
    PromptTuning,
    VeRA,
    attach,
    load_adapter,
)
from tunesmith.errors import MethodError
from tunesmith.methods.contract import Method
from tunesmith.methods.tuned import TunedModel

Trained = Callable[[TunedModel], TunedModel]

EVERYWHERE = IA3(targets=["attention.k", "attention.o", "mlp.down"], inputs=["mlp.down"])
MERGEABLE = {
    "ia3-lora": (EVERYWHERE, LoRA(rank=4)),
    "ia3-bitfit": (EVERYWHERE, BitFit()),
    "ia3-diff": (EVERYWHERE, DiffPruning()),
    "dora-bitfit": (LoRA(rank=4, dora=True), BitFit()),
    "lora-vera": (LoRA(rank=4), VeRA(rank=4)),
    "lora-ada-ia3": (LoRA(rank=4), AdaLoRA(rank=4, target_rank=2), EVERYWHERE),
}
ORDERS = [
    pytest.param(list(order), id=f"{name}-{i}")
    for name, methods in MERGEABLE.items()
    for i, order in enumerate(permutations(methods))
]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


@pytest.mark.parametrize("methods", ORDERS)
def test_merged_is_unmerged_in_every_order_of_attaching(
    methods: list[Method], input_ids: Tensor, trained: Trained
) -> None:
    tuned = trained(attach(tiny_gpt2(), *methods))
    unmerged = logits(tuned.model, input_ids)
    with tuned.merged() as model:
        torch.testing.assert_close(logits(model, input_ids), unmerged, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(tuned.model, input_ids), unmerged)


@pytest.mark.parametrize(
    "methods", list(permutations([EVERYWHERE, LoRA(rank=4), Adapter(bottleneck=4)]))
)
def test_an_adapter_goes_on_from_what_the_others_made_of_the_map(
    methods: list[Method], input_ids: Tensor, trained: Trained
) -> None:
    tuned = trained(attach(tiny_gpt2(), *methods))
    together = logits(tuned.model, input_ids)
    linear = [p.attachment for p in tuned.parts if not isinstance(p.method, Adapter)]
    for attachment in sorted(linear, key=lambda a: a.turn):
        attachment.merge()
    torch.testing.assert_close(logits(tuned.model, input_ids), together, atol=1e-5, rtol=1e-5)


def test_the_order_of_attaching_does_not_change_what_rescaling_does(input_ids: Tensor) -> None:
    outs = []
    for methods in permutations([IA3(), LoRA(rank=4)]):
        torch.manual_seed(0)
        tuned = attach(tiny_llama(), *methods)
        torch.manual_seed(0)
        values = {n: torch.randn(p.shape) for n, p in sorted(tuned.trainable().items())}
        tuned.load_state_dict(values)
        tuned.model.load_state_dict(BASE, strict=False)
        outs.append(logits(tuned.model, input_ids))
    torch.testing.assert_close(*outs)


BASE = tiny_llama().state_dict()


@pytest.mark.parametrize(
    "methods",
    [
        [PrefixTuning(length=3), LoRA(rank=4), PromptTuning(tokens=2)],
        [LoRA(rank=2, targets=["attention.q"]), LoRA(rank=4, targets=["mlp.down"])],
        [LastLayer(), PrefixTuning(length=3)],
        [PromptTuning(tokens=3), Full()],
    ],
)
def test_several_are_saved_one_folder_each_and_loaded_in_their_order(
    methods: list[Method], input_ids: Tensor, trained: Trained, tmp_path: Path
) -> None:
    tuned = trained(attach(tiny_llama(), *methods))
    tuned.save(tmp_path / "adapter")
    assert len(list((tmp_path / "adapter").iterdir())) == len(methods)
    base = tuned.detach()
    loaded = load_adapter(base, tmp_path / "adapter")
    assert [part.method for part in loaded.parts] == methods
    got = logits(loaded.model, input_ids)
    again = load_adapter(loaded.detach(), tmp_path / "adapter")
    assert torch.equal(logits(again.model, input_ids), got)


@pytest.mark.parametrize(
    ("methods", "parts"),
    [
        ([Full(), LoRA(rank=4)], ["full and lora", "attn.c_attn.weight", "attention.q"]),
        ([LoRA(rank=4), LastLayer()], ["lora and last_layer", "transformer.h.1.", "weight"]),
        ([BitFit(), DiffPruning()], ["bitfit and diff_pruning", "bias"]),
        ([LoRA(rank=4, dora=True), VeRA(rank=4)], ["lora and vera", "weight"]),
    ],
)
def test_two_methods_that_train_one_parameter_are_refused(
    methods: list[Method], parts: list[str], input_ids: Tensor
) -> None:
    model = tiny_gpt2()
    before = logits(model, input_ids)
    with pytest.raises(MethodError) as caught:
        attach(model, *methods)
    for part in [*parts, "choose one"]:
        assert part in str(caught.value)
    assert torch.equal(logits(model, input_ids), before)
    assert list(model.state_dict()) == list(tiny_gpt2().state_dict())


def test_methods_of_other_parameters_do_not_fight() -> None:
    assert len(attach(tiny_gpt2(), BitFit(), LoRA(rank=4), PrefixTuning(length=2)).parts) == 3
