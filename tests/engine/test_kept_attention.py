"""Blocks that keep what attention returned and compute all else again, compiled and not.

What is compiled here is cut by PyTorch's compiler, with its passes, but run as the graphs say: the
code for them would take minutes. One test has it written, for a small block of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch.utils.checkpoint import CheckpointPolicy

from families import FAMILIES
from numerics.matrix import IDS, base, method_of, trained
from tiny import tiny_llama
from tunesmith.engine import blocks
from tunesmith.engine.blocks import Blocks, Level, levels_of, training_blocks
from tunesmith.engine.recompute import ATTENTION as ATTENTIONS
from tunesmith.engine.recompute import _policy
from tunesmith.engine.settings import EngineSettings
from tunesmith.methods import LoRA
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.quantize import quantise
from tunesmith.models.settings import ModelSettings

CPU = torch.device("cpu")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph of another test, and a cache of this one's own."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    torch._dynamo.reset()
    counters.clear()


class Cut:
    """The graphs of both passes, as they are handed to the generator of code."""

    def __init__(self) -> None:
        self.forward: list[fx.Graph] = []
        self.backward: list[fx.Graph] = []

    def compile(self, gm: fx.GraphModule, inputs: Any, **facts: Any) -> Callable[..., Any]:
        del inputs
        (self.backward if facts.get("is_backward") else self.forward).append(gm.graph)

        def run(args: list[Any]) -> Any:
            return fx.Interpreter(gm).boxed_run(args)

        run._boxed_call = True  # type: ignore[attr-defined]  # it lets go of what it is given
        return run


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    """The compiler without its generator of code."""
    graphs = Cut()

    def compiled(self: Any, model: fx.GraphModule, inputs: Any) -> Any:
        patches = dict(self.config)
        return compile_fx.compile_fx(model, inputs, graphs.compile, config_patches=patches)

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", compiled)
    return graphs


@contextmanager
def training(tuned: TunedModel, mode: str, speed: str = "compiled") -> Iterator[Blocks]:
    blocks = [tuned.model.get_submodule(block.path) for block in tuned.sites.blocks]
    settings = EngineSettings.model_validate(
        {"device": "cpu", "speed": speed, "checkpointing": mode}
    )
    with training_blocks(tuned.model, blocks, settings, device=CPU) as running:
        tuned.model.train()
        yield running
        assert not running.failed


def tuned_of(family: str, method: str) -> TunedModel:
    chosen = LoRA(dora=True) if method == "dora" else method_of(method)
    return trained(attach(base(family), chosen))


def gradients(tuned: TunedModel, family: str = "llama") -> dict[str, Tensor]:
    torch.manual_seed(3)
    tuned.model.train()
    tuned.model.zero_grad()
    FAMILIES[family].loss(tuned.model, IDS).backward()
    named = tuned.trainable().items()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def operations(graph: fx.Graph) -> Counter[str]:
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    return Counter(x.name().partition(".")[0] for x in targets if hasattr(x, "name"))


def kept(graph: fx.Graph) -> list[fx.Node]:
    """What a forward pass returns beyond its first result and what was handed to it."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    made = [node for node in output.args[0][1:] if node is not None and node.op != "placeholder"]
    return [node for node in made if isinstance(node.meta["val"], Tensor)]


def operator_of(result: fx.Node) -> str:
    """Of which operation it is one of the results."""
    name: str = result.args[0].target.name()  # type: ignore[union-attr]
    return name.partition(".")[0]


WAYS = [
    ("llama", "lora"),
    ("llama", "dora"),
    ("qwen3", "ia3"),
    ("gemma3_text", "adapter"),
    ("llama", "prefix_tuning"),
    ("gpt2", "lora"),
]


@pytest.mark.parametrize(("family", "method"), WAYS)
def test_compiled_blocks_give_the_same_gradients_and_keep_attention_alone(
    family: str, method: str, cut: Cut
) -> None:
    tuned = tuned_of(family, method)
    expected = gradients(tuned, family)
    with training(tuned, "attention"):
        found = gradients(tuned, family)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert cut.forward
    assert len(cut.forward) == len(cut.backward)
    for forward, backward in zip(cut.forward, reversed(cut.backward), strict=True):
        assert operations(forward)[ATTENTION] == 1
        assert operations(backward)[ATTENTION] == 0
        assert {operator_of(node) for node in kept(forward)} == {ATTENTION}


@pytest.mark.parametrize(("family", "method"), WAYS)
def test_uncompiled_blocks_give_the_same_gradients(family: str, method: str) -> None:
    tuned = tuned_of(family, method)
    expected = gradients(tuned, family)
    with training(tuned, "attention", speed="safe"):
        found = gradients(tuned, family)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_what_the_backward_pass_does_not_need_is_not_computed_again(cut: Cut) -> None:
    # Wider than what is joined with LoRA's products.
    model = tiny_llama(hidden_size=160, intermediate_size=192)
    tuned = trained(attach(model, LoRA(rank=2)))
    with training(tuned, "attention"):
        gradients(tuned)

    def products(graph: fx.Graph, shape: tuple[int, int]) -> int:
        """How many are with a weight of that shape, turned once as the forward pass turns it."""
        given = [node for node in graph.nodes if node.op == "placeholder"]
        weights = [node for node in given if tuple(node.meta["val"].shape) == shape]
        turned = [user for x in weights for user in x.users if "permute" in str(user.target)]
        return sum("mm" in str(user.target) for node in turned for user in node.users)

    up, down = (192, 160), (160, 192)
    assert [(products(g, up), products(g, down)) for g in cut.forward] == [(2, 1), (2, 1)]
    assert [(products(g, up), products(g, down)) for g in cut.backward] == [(2, 0), (2, 0)]


CODES = [("fp8", "dtype"), ("nf4", "dtype"), ("nf4", "float8")]


@pytest.mark.parametrize(("kind", "products"), CODES)
def test_products_of_coded_weights_are_computed_again(kind: str, products: str, cut: Cut) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2)
    settings = {"name": "tiny", "quantize": kind, "products": products}
    quantise(model, ModelSettings.model_validate(settings), device="cpu")
    tuned = trained(attach(model, LoRA(rank=4)))
    expected = gradients(tuned)
    with training(tuned, "attention"):
        found = gradients(tuned)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(cut.forward) == 2
    for graph in cut.forward:
        assert {operator_of(node) for node in kept(graph)} == {ATTENTION}


def test_a_block_without_an_operator_of_attention_keeps_its_input(cut: Cut) -> None:
    model = tiny_llama(attn_implementation="eager")
    tuned = trained(attach(model, LoRA(rank=2)))
    expected = gradients(tuned)
    with training(tuned, "attention"):
        found = gradients(tuned)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert [kept(graph) for graph in cut.forward] == [[], []]


def test_every_length_has_one_graph(cut: Cut) -> None:
    tuned = trained(attach(tiny_llama(), LoRA(rank=2)))

    def outcome(length: int) -> dict[str, Tensor]:
        ids = torch.arange(2 * length).reshape(2, length)
        tuned.model.zero_grad()
        tuned.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in tuned.trainable().items()}

    tuned.model.train()
    lengths = [5, 9, 7, 13]
    expected = [outcome(length) for length in lengths]
    with training(tuned, "attention") as running:
        for length, wanted in zip(lengths, expected, strict=True):
            running.see({"input_ids": torch.empty(2, length)})
            torch.testing.assert_close(outcome(length), wanted, atol=1e-6, rtol=1e-5)
    assert len(cut.forward) == 4
    assert all({operator_of(node) for node in kept(x)} == {ATTENTION} for x in cut.forward)


def test_blocks_that_keep_attention_and_blocks_that_keep_more_stand_side_by_side(
    cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = [Level(None), Level("attention", 0.5), Level("attention"), Level("full")]
    monkeypatch.setattr(blocks, "levels_of", lambda *_, **__: list(levels))
    tuned = trained(attach(tiny_llama(num_hidden_layers=4), LoRA(rank=2)))
    expected = gradients(tuned)

    def graphs_of(level: Level) -> int:
        """How many are made more."""
        before = len(cut.forward)
        while running.level != level:
            assert running.keep_less("a test wants it")
        torch.testing.assert_close(gradients(tuned), expected, atol=1e-6, rtol=1e-5)
        return len(cut.forward) - before

    with training(tuned, "auto") as running:
        # The first block's input needs no gradient, that of the others does.
        assert graphs_of(Level(None)) == 2
        assert graphs_of(Level("attention", 0.5)) == 2
        assert graphs_of(Level("attention")) == 0
        assert graphs_of(Level("full")) == 0
    sizes = [len(kept(graph)) for graph in cut.forward]
    assert min(sizes[:2]) > max(sizes[2:]) == 2


def test_auto_keeps_less_in_more_and_more_blocks() -> None:
    shares = [Level("attention", (index + 1) / 8) for index in range(8)]
    first, after, settings = Level(None), [Level("full"), Level("offload")], EngineSettings()
    assert levels_of(settings, compiled=True) == [first, *shares, *after]
    assert levels_of(settings, compiled=False) == [first, Level("selective"), *shares, *after]


class Small(nn.Module):
    """A block with dropout after its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        x = x + F.dropout(seen.transpose(1, 2).flatten(2), 0.5)
        out: Tensor = self.out(F.dropout(self.inner(x).tanh(), 0.5))
        return x + out


def small_step(mode: str) -> tuple[list[Tensor], int]:
    """Gradients of generated code, and the numbers that it kept."""
    torch.manual_seed(0)
    model = nn.Sequential(Small(), Small()).train()
    settings = EngineSettings.model_validate(
        {"device": "cpu", "speed": "compiled", "checkpointing": mode}
    )
    x = torch.randn(2, 6, 8, requires_grad=True)
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        training_blocks(model, list(model), settings, device=CPU) as running,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        torch.manual_seed(1)
        loss = model(x).square().sum()
        loss.backward()
        assert not running.failed
    numbers = sum(tensor.numel() for tensor in found.values())
    return [x.grad, *(p.grad for p in model.parameters())], numbers  # type: ignore[list-item]


def test_generated_code_drops_the_same_and_is_kept_apart_on_disk() -> None:
    expected, more = small_step("none")
    found, numbers = small_step("attention")
    torch.testing.assert_close(found, expected)
    assert numbers < more
    # From the disk, in another order.
    torch._dynamo.reset()
    counters.clear()
    again, same = small_step("attention")
    torch.testing.assert_close(again, expected)
    assert same == numbers
    assert small_step("none")[1] == more
    assert counters["aot_autograd"]["autograd_cache_miss"] == 0
    assert counters["aot_autograd"]["autograd_cache_hit"] == 2


def test_attention_that_drops_weights_is_computed_again_where_later_dropout_follows() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.empty(1, 1, 8, 8)
    policies = [_policy(ATTENTIONS, None, flash, q, q, q, drop) for drop in (0.0, 0.1)]
    assert policies == [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE]
