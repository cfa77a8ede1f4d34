"""What `engine.speed: auto` runs on CUDA is what `safe` runs, in bfloat16, for every kind of block.

Rounding in bfloat16 depends on the order of sums, which the compiler changes. So compiled and plain
are each compared with float32: what is compiled may be twice as far from it, and no more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from families import FAMILIES
from numerics.matrix import base, method_of, tokens, trained
from tunesmith.engine.blocks import Blocks, training_blocks
from tunesmith.engine.host_copies import HostCopies
from tunesmith.engine.settings import EngineSettings
from tunesmith.methods import LoRA
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.attention import enable_segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
KINDS = ["llama", "qwen3", "gemma3_text", "gpt2", "bert"]
DECODERS = KINDS[:4]
WAYS = [
    ("dora", "llama"),
    ("ia3", "llama"),
    ("adapter", "llama"),
    ("prefix_tuning", "llama"),
    ("full", "llama"),
    ("bitfit", "gpt2"),
]
IDS = tokens(2, 48)


@pytest.fixture(autouse=True)
def fresh() -> None:
    """No graph of another test in memory; the code on disk is used again."""
    torch._dynamo.reset()
    counters.clear()


def tuned_of(family: str, method: str, dtype: torch.dtype = torch.bfloat16) -> TunedModel:
    """A family's model with a method that changes it, the same in every dtype."""
    chosen = LoRA(dora=True) if method == "dora" else method_of(method)
    tuned = trained(attach(base(family), chosen))
    tuned.model.to(CUDA, dtype)
    return tuned


def blocks_of(tuned: TunedModel) -> list[nn.Module]:
    return [tuned.model.get_submodule(block.path) for block in tuned.sites.blocks]


@contextmanager
def running(
    tuned: TunedModel, speed: str = "auto", checkpointing: str = "none"
) -> Iterator[Blocks]:
    settings = EngineSettings.model_validate({"speed": speed, "checkpointing": checkpointing})
    with training_blocks(tuned.model, blocks_of(tuned), settings, device=CUDA) as blocks:
        tuned.model.train()
        yield blocks
        assert not blocks.failed
        assert (counters["stats"]["unique_graphs"] > 0) is (speed == "auto")


def outcome(tuned: TunedModel, family: str) -> dict[str, Tensor]:
    """Logits, and the gradient of every trainable that has one."""
    tuned.model.zero_grad()
    out = tuned.model(**FAMILIES[family].inputs(IDS.to(CUDA)), labels=IDS.to(CUDA))
    out.loss.backward()
    named = tuned.trainable().items()
    found = {name: p.grad.float() for name, p in named if p.grad is not None}
    return found | {"logits": out.logits.detach().float()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference among the tensors, relative to the tensor.

    A gradient that is nothing beside the others, as that of a key's bias, is rounding alone; so a
    hundredth of the largest counts in.
    """
    assert one.keys() == other.keys()
    least = 0.01 * max(float(x.norm()) for name, x in other.items() if name != "logits")
    return max(
        float((one[name] - other[name]).norm()) / (float(other[name].norm()) + least)
        for name in one
    )


def check(family: str, method: str, checkpointing: str = "none") -> None:
    counters.clear()
    with running(exact := tuned_of(family, method, torch.float32), "safe"):
        expected = outcome(exact, family)
    with running(plain := tuned_of(family, method), "safe"):
        limit = 2 * distance(outcome(plain, family), expected)
    with running(fast := tuned_of(family, method), checkpointing=checkpointing):
        assert distance(outcome(fast, family), expected) < limit + 1e-3


@pytest.mark.parametrize("family", KINDS)
def test_values_and_gradients(family: str) -> None:
    check(family, "lora")


@pytest.mark.parametrize(("method", "family"), WAYS)
def test_values_and_gradients_of_every_way_into_a_block(method: str, family: str) -> None:
    check(family, method)


@pytest.mark.parametrize("checkpointing", ["selective", "full", "offload"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_computing_again(family: str, checkpointing: str) -> None:
    check(family, "lora", checkpointing)


@pytest.mark.parametrize("family", KINDS)
def test_switched_off_is_the_base(family: str) -> None:
    tuned = tuned_of(family, "lora")
    inputs = FAMILIES[family].inputs(IDS.to(CUDA))
    plain = base(family).to(CUDA, torch.bfloat16).train()
    untouched = attach(plain, LoRA())  # its pairs start at zero, and are in the graph too
    with running(tuned), tuned.disabled(), torch.no_grad():
        off = tuned.model(**inputs).logits
    with running(untouched), untouched.disabled(), torch.no_grad():
        torch.testing.assert_close(untouched.model(**inputs).logits, off, rtol=0, atol=0)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_that_of_the_plain_model(family: str) -> None:
    tuned = tuned_of(family, "lora")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    expected = tuned.model.eval().generate(IDS[:, :12].to(CUDA), **options)
    with running(tuned):
        outcome(tuned, family)
        tuned.model.eval()
        assert torch.equal(tuned.model.generate(IDS[:, :12].to(CUDA), **options), expected)


def packed(lengths: list[int]) -> dict[str, Any]:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": tokens(1, sum(lengths)).to(CUDA),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(CUDA),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds.clone(),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize("family", DECODERS)
def test_segments_side_by_side_in_one_graph_for_all_lengths(family: str) -> None:
    tuned = tuned_of(family, "lora")
    assert enable_segments(tuned.model)
    batches = [packed(x) for x in ([20, 13], [31, 17, 24], [40, 9, 12, 30], [50, 14])]
    tuned.model.train()
    expected = [tuned.model.base_model(**x).last_hidden_state.detach() for x in batches]
    with running(tuned) as blocks:
        for index, (batch, hidden) in enumerate(zip(batches, expected, strict=True)):
            blocks.see(batch)
            found = tuned.model.base_model(**batch, use_cache=False).last_hidden_state
            found.float().sum().backward()
            # bfloat16 has 8 bits, and a block rounds a dozen times.
            torch.testing.assert_close(found, hidden, rtol=5e-2, atol=5e-2)
            if index == 1:
                warm = counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == warm


def test_host_copies_outlive_their_tensors() -> None:
    copies = HostCopies()
    tensors = [torch.randn(1024, 1024, device=CUDA) for _ in range(6)]
    expected = [tensor.cpu() for tensor in tensors]
    away = [copies.send(tensor) for tensor in tensors]
    del tensors
    garbage = [torch.full((1024, 1024), torch.nan, device=CUDA) for _ in range(6)]
    for copy, tensor in zip(reversed(away), reversed(expected), strict=True):
        assert torch.equal(copy.fetch().cpu(), tensor)
    assert all(bool(x.isnan().all()) for x in garbage)
