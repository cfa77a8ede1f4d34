"""What `engine.speed: auto` runs on CUDA is what `safe` runs, in bfloat16, for every kind of block.

Rounding in bfloat16 depends on the order of sums, which the compiler changes. So compiled and plain
are each compared with float32: what is compiled may be twice as far from it, and no more.

Compiling is what takes the time here: tests of one family are about one model, so that a graph that
one of them had compiled is there for the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from families import FAMILIES
from numerics.matrix import ROWS, base, method_of, tokens, trained
from tiny import tiny_llama
from tunesmith.engine.blocks import Blocks, training_blocks
from tunesmith.engine.host_copies import HostCopies
from tunesmith.engine.settings import EngineSettings
from tunesmith.methods import LoRA
from tunesmith.methods.child import base_parameters
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.attention import enable_segments
from tunesmith.models.quantize import quantise
from tunesmith.models.settings import ModelSettings
from tunesmith.ops.fp8_linear import CAPABILITY

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


class Case(NamedTuple):
    """LoRA that acts on one family's model, in bfloat16."""

    family: str
    tuned: TunedModel


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    torch._dynamo.reset()
    return Case(request.param, tuned_of(request.param, "lora"))


@pytest.fixture
def decoder(case: Case) -> Case:
    if case.family not in DECODERS:
        pytest.skip("generates nothing")
    return case


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


def on_cuda(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(CUDA) for name, value in inputs.items()}


def inputs_of(family: str) -> dict[str, Any]:
    return on_cuda(FAMILIES[family].inputs(IDS))


@torch.no_grad()
def logits(case: Case, *, training: bool = True) -> Tensor:
    case.tuned.model.train(training)
    return case.tuned.model(**inputs_of(case.family)).logits


def outcome(tuned: TunedModel, family: str) -> dict[str, Tensor]:
    """Logits, and the gradient of everything that has one."""
    tuned.model.zero_grad()
    out = tuned.model(**inputs_of(family), labels=IDS.to(CUDA))
    out.loss.backward()
    named = tuned.model.named_parameters()
    found = {name: p.grad.float() for name, p in named if p.grad is not None}
    return found | {"logits": out.logits.detach().float()}


@cache
def plain_outcomes(family: str, method: str) -> tuple[dict[str, Tensor], float]:
    """What float32 gives, and how far uncompiled bfloat16 is from it."""
    counters.clear()
    with running(exact := tuned_of(family, method, torch.float32), "safe"):
        expected = outcome(exact, family)
    with running(plain := tuned_of(family, method), "safe"):
        return expected, distance(outcome(plain, family), expected)


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


@torch.no_grad()
def near(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for rounding: bfloat16's 2^-9, a dozen times a block."""
    return float((found.float() - expected.float()).norm() / expected.float().norm()) < 2e-2


def check(family: str, method: str, tuned: TunedModel, checkpointing: str = "none") -> None:
    expected, plain = plain_outcomes(family, method)
    with running(tuned, checkpointing=checkpointing):
        assert distance(outcome(tuned, family), expected) < 2 * plain + 1e-3


def test_values_and_gradients_and_a_base_that_stays(case: Case) -> None:
    before = {name: p.clone() for name, p in base_parameters(case.tuned.model).items()}
    check(case.family, "lora", case.tuned)
    reached = {name for name, p in case.tuned.model.named_parameters() if p.grad is not None}
    assert reached == set(case.tuned.trainable())
    with changed(case.tuned, factor=1.0):
        torch.optim.SGD(case.tuned.trainable().values(), lr=0.1).step()
    after = base_parameters(case.tuned.model)
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_off_is_the_base_whatever_was_trained(case: Case) -> None:
    with running(case.tuned), case.tuned.disabled():
        off = logits(case)
        assert near(
            off, base(case.family).to(CUDA, torch.bfloat16)(**inputs_of(case.family)).logits
        )
        with changed(case.tuned):
            assert torch.equal(logits(case), off)


@contextmanager
def changed(tuned: TunedModel, factor: float = 2.0) -> Iterator[None]:
    """Other values in what is trained, inside a `with` block."""
    kept = {name: p.detach().clone() for name, p in tuned.trainable().items()}
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.mul_(factor)
    yield
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            parameter.copy_(kept[name])


def test_a_start_at_nothing_is_the_base(case: Case) -> None:
    with running(case.tuned):
        with case.tuned.disabled():
            off = logits(case)
        with changed(case.tuned, factor=0.0):
            assert near(logits(case), off)
        assert not near(logits(case), off)


def test_saved_and_loaded_is_the_same(case: Case, tmp_path: Path) -> None:
    with running(case.tuned):
        outcome(case.tuned, case.family)
        case.tuned.save(tmp_path / "adapter")
    loaded = load_adapter(base(case.family).to(CUDA, torch.bfloat16), tmp_path / "adapter")
    expected = logits(case, training=False)
    assert torch.equal(logits(Case(case.family, loaded), training=False), expected)


def test_merged_is_unmerged(case: Case) -> None:
    with running(case.tuned):
        unmerged = logits(case)
        case.tuned.merge()
        merged = logits(case)
        case.tuned.unmerge()
        # The sum of weight and change is rounded to bfloat16 as well.
        assert float((merged - unmerged).norm() / unmerged.norm()) < 4e-2
        assert torch.equal(logits(case), unmerged)


@pytest.mark.parametrize("checkpointing", ["attention", "full", "offload"])
def test_computing_again(case: Case, checkpointing: str) -> None:
    check(case.family, "lora", case.tuned, checkpointing)


def test_padding_changes_nothing(case: Case) -> None:
    inputs = on_cuda(FAMILIES[case.family].padded(ROWS))
    with running(case.tuned), torch.no_grad():
        together = case.tuned.model(**inputs).logits
        case.tuned.model.eval()  # which is not compiled
        for row, out in zip(ROWS, together, strict=True):
            inputs = on_cuda(FAMILIES[case.family].inputs(row[None]))
            alone = case.tuned.model(**inputs).logits[0]
            assert near(FAMILIES[case.family].tokens(out, len(row)), alone)


def test_generation_is_that_of_the_plain_model(decoder: Case) -> None:
    tuned = decoder.tuned
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    expected = tuned.model.eval().generate(IDS[:, :12].to(CUDA), **options)
    with running(tuned):
        outcome(tuned, decoder.family)
        tuned.model.eval()
        assert torch.equal(tuned.model.generate(IDS[:, :12].to(CUDA), **options), expected)


@pytest.mark.parametrize(("method", "family"), WAYS)
def test_values_and_gradients_of_every_way_into_a_block(method: str, family: str) -> None:
    torch._dynamo.reset()
    check(family, method, tuned_of(family, method))


def test_selective_recomputation_of_a_compiled_block() -> None:
    torch._dynamo.reset()
    check("llama", "lora", tuned_of("llama", "lora"), "selective")


def coded(kind: str, products: str) -> TunedModel:
    """LoRA that acts, on a Llama wide enough for every kernel of codes."""
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=256, intermediate_size=512, initializer_range=0.05).bfloat16()
    settings = {"name": "tiny", "quantize": kind, "products": products}
    quantise(model, ModelSettings.model_validate(settings), device="cuda")
    tuned = trained(attach(model.to(CUDA), LoRA(rank=4)))
    tuned.model.train()
    return tuned


def kept_and_gradients(tuned: TunedModel, checkpointing: str) -> tuple[int, Tensor]:
    """Bytes between the passes, and all gradients one after another (numbers,) float32."""
    ids = tokens(2, 45).to(CUDA)  # no multiple of 8, and nor are the rows of a product
    with running(tuned, checkpointing=checkpointing):
        for _ in range(2):  # the first compiles, and products take their workspaces
            tuned.model.zero_grad()
            before = torch.cuda.memory_allocated()
            loss = tuned.model(input_ids=ids, labels=ids).loss
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
    return kept, torch.cat([p.grad.flatten().float() for p in tuned.trainable().values()])


@pytest.mark.parametrize(
    ("kind", "products"),
    [("none", "dtype"), ("fp8", "dtype"), ("nf4", "dtype"), ("nf4", "float8")],
)
def test_blocks_that_keep_attention_alone(kind: str, products: str) -> None:
    float8 = "float8" in products or kind == "fp8"
    if float8 and torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("needs a GPU of compute capability 8.9")
    torch._dynamo.reset()
    tuned = coded(kind, products)
    most, expected = kept_and_gradients(tuned, "none")
    some, found = kept_and_gradients(tuned, "attention")
    least, _ = kept_and_gradients(tuned, "full")
    # Kernels are joined otherwise, which rounds elsewhere, with float8 to the next code at times.
    assert float((found - expected).norm() / expected.norm()) < (0.2 if float8 else 0.05)
    assert least < some < most
    # The output in bfloat16, and a float32 of each head.
    output = 2 * 45 * (2 * 256 + 4 * tuned.model.config.num_attention_heads)
    assert some - least < 1.5 * len(tuned.sites.blocks) * output


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
    torch._dynamo.reset()
    tuned = tuned_of(family, "lora")
    assert enable_segments(tuned.model)
    batches = [packed(x) for x in ([20, 13], [31, 17, 24], [40, 9, 12, 30])]
    tuned.model.train()
    expected = [tuned.model.base_model(**x).last_hidden_state.detach() for x in batches]
    with running(tuned) as blocks:
        for index, (batch, hidden) in enumerate(zip(batches, expected, strict=True)):
            blocks.see(batch)
            found = tuned.model.base_model(**batch, use_cache=False).last_hidden_state
            found.float().sum().backward()
            assert near(found, hidden)
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
