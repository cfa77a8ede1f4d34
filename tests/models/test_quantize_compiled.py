"""Blocks on coded weights as one graph: what is done once, and what is kept for the backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from tiny import tiny_llama
from tunesmith.engine.compiled import compiling
from tunesmith.methods import LoRA
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.quantize import quantise
from tunesmith.models.settings import ModelSettings

pytest.importorskip("bitsandbytes")

IDS = torch.arange(3, 27).reshape(2, 12)
CODES = [("fp8", "dtype"), ("nf4", "dtype"), ("nf4", "float8")]
codes = pytest.mark.parametrize(("kind", "products"), CODES, ids=["fp8", "nf4", "nf4-float8"])
LARGEST_ACTIVATION = 2 * 12 * 128
WEIGHT = 64 * 128
"""Weights of a matrix of the feed-forward branch; more than any activation has numbers."""


def tuned_of(kind: str, products: str) -> TunedModel:
    """LoRA that acts, on codes."""
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2)
    settings = {"name": "tiny", "quantize": kind, "products": products}
    quantise(model, ModelSettings.model_validate(settings), device="cpu")
    tuned = attach(model, LoRA(rank=4))
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    tuned.model.train()
    return tuned


def gradients(tuned: TunedModel) -> dict[str, Tensor]:
    tuned.model.zero_grad()
    tuned.model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in tuned.trainable().items() if p.grad is not None}


def compiled(tuned: TunedModel, backend: Any) -> None:
    torch._dynamo.reset()
    for layer in tuned.model.model.layers:
        layer.compile(fullgraph=True, backend=backend)


def recording(graphs: dict[str, list[fx.Graph]]) -> Any:
    """A backend that keeps the graphs of the passes, cut as the usual one cuts them."""

    def keep(which: str) -> Callable[..., Any]:
        def compiler(module: fx.GraphModule, _: object) -> Callable[..., Any]:
            graphs.setdefault(which, []).append(module.graph)

            def run(arguments: list[Any]) -> Any:
                return fx.Interpreter(module).boxed_run(arguments)

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compiler

    return aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )


@codes
def test_a_block_is_one_graph_with_the_same_gradients(kind: str, products: str) -> None:
    tuned = tuned_of(kind, products)
    expected = gradients(tuned)
    compiled(tuned, "aot_eager")
    torch.testing.assert_close(gradients(tuned), expected)


@codes
def test_checkpointing_gives_the_same_gradients(kind: str, products: str) -> None:
    tuned = tuned_of(kind, products)
    expected = gradients(tuned)
    tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(tuned), expected)


def _dtypes(graph: fx.Graph) -> list[torch.dtype]:
    """The dtypes that tensors are cast to, in order."""
    casts = (node.kwargs.get("dtype") for node in graph.nodes if "_to_copy" in str(node.target))
    return [dtype for dtype in casts if dtype is not None]


def test_maps_that_read_the_same_input_share_its_codes() -> None:
    graphs: dict[str, list[fx.Graph]] = {}
    tuned = tuned_of("fp8", "dtype")
    compiled(tuned, recording(graphs))
    gradients(tuned)
    # q, k and v share one input, gate and up another; o and down have their own.
    assert [_dtypes(g).count(torch.float8_e4m3fn) for g in graphs["forward"]] == [4, 4]
    products = [
        [node for node in g.nodes if "scaled_product" in str(node.target)]
        for g in graphs["forward"]
    ]
    assert [len(found) for found in products] == [7, 7]


@codes
def test_no_unpacked_or_turned_weight_is_kept_for_the_backward(kind: str, products: str) -> None:
    graphs: dict[str, list[fx.Graph]] = {}
    tuned = tuned_of(kind, products)
    compiled(tuned, recording(graphs))
    gradients(tuned)
    assert len(graphs["forward"]) == 2
    for graph in graphs["forward"]:
        (output,) = (node for node in graph.nodes if node.op == "output")
        kept = [node for node in output.args[0] if node is not None and node.op != "placeholder"]
        sizes = [node.meta["val"].numel() for node in kept]
        assert sizes
        assert max(sizes) <= LARGEST_ACTIVATION < WEIGHT


@codes
def test_selective_recomputation_keeps_the_products(kind: str, products: str) -> None:
    graphs: dict[str, list[fx.Graph]] = {}
    tuned = tuned_of(kind, products)
    with compiling(recomputes_pointwise=True):
        compiled(tuned, recording(graphs))
        gradients(tuned)
    # Backward has the products of the input's gradient, of which the first block needs no first.
    targets = ("scaled_product", "nf4_values", "nf4_float8")
    for graph in graphs["backward"]:
        done = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert max(sum(target in name for name in done) for target in targets) <= 7
