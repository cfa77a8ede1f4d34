"""The simulated step against bytes counted by hand, and against what a real step keeps."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.engine.blocks import training_blocks
from tunesmith.engine.settings import EngineSettings
from tunesmith.measure.simulated_graph import Graphs, SimulatedGraph, _last_uses, _written
from tunesmith.measure.simulated_memory import ROUNDING as ROUNDINGS
from tunesmith.measure.simulated_memory import StepMemory, simulate_step
from tunesmith.methods import Full, LoRA
from tunesmith.methods.tuned import attach
from tunesmith.objectives import SFT

ROUNDING = ROUNDINGS["cuda"]
ROWS, WIDTH = 256, 1024
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_linear_map_keeps_its_input_and_makes_its_gradient() -> None:
    with torch.device("meta"):
        model = nn.Linear(WIDTH, WIDTH, bias=False)

    def inputs() -> dict[str, Tensor]:
        return {"x": torch.empty(ROWS, WIDTH)}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).sum()

    step = simulate_step(model, inputs, loss)
    weight, rows = 4 * WIDTH * WIDTH, 4 * ROWS * WIDTH
    assert step.parameters == weight
    assert step.activations == rows + ROUNDING  # the input, and the loss
    assert step.gradients == weight
    # The output's gradient is one number that expands; new are the weight's and the loss's.
    assert step.peak == weight + rows + weight + 2 * ROUNDING


def simulated(method: Full | LoRA, *, checkpointing: bool = False) -> StepMemory:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    attach(model, method)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return simulate_step(model, batch, lambda inputs: SFT().loss(model, inputs).total)


def batch() -> dict[str, Tensor]:
    ids = torch.zeros(4, 64, dtype=torch.int64)
    positions = torch.arange(64)[None].expand(4, -1)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def kept_in_truth(method: Full | LoRA) -> int:
    """Bytes of the different storages that a real forward saves for backward, weights left out."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    attach(model, method)
    model.train()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = SFT().loss(model, batch())
    assert terms.total.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_models_activations_are_what_a_real_forward_saves() -> None:
    for method in (LoRA(), Full(keep_base=False)):
        truth = kept_in_truth(method)
        found = simulated(method).activations
        # Besides what is saved, the batch, the last hidden states and the targets are there.
        assert truth <= found <= 1.1 * truth


def test_checkpointing_keeps_the_inputs_of_the_blocks() -> None:
    plain, recomputed = simulated(LoRA()), simulated(LoRA(), checkpointing=True)
    blocks = 3 * 4 * 64 * 128 * 4
    assert recomputed.parameters == plain.parameters
    assert blocks <= recomputed.activations <= 3 * blocks
    assert recomputed.peak < plain.peak


def test_twice_the_rows_keep_twice_as_much() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    attach(model, LoRA())

    def double() -> dict[str, Tensor]:
        return {name: torch.cat([tensor, tensor]) for name, tensor in batch().items()}

    step = simulate_step(model, double, lambda inputs: SFT().loss(model, inputs).total)
    assert 1.98 < step.activations / simulated(LoRA()).activations < 2.02


def test_a_block_as_graphs_keeps_less_than_as_it_is_written() -> None:
    plain, compiled = (compiled_step(graphs=graphs) for graphs in (False, True))
    assert compiled.parameters == plain.parameters
    assert compiled.activations < plain.activations


@pytest.mark.parametrize("graphs", [False, True])
def test_a_block_that_keeps_attention_keeps_little_beside_its_input(graphs: bool) -> None:
    full, keeping = (compiled_step(graphs=graphs, mode=mode) for mode in ("full", "attention"))
    tokens = batch()["input_ids"].numel()
    # The output, and the logarithm of the sum of exponentials of each head.
    numbers = tokens * (SIZES["hidden_size"] + SIZES["num_attention_heads"])
    expected = 4 * SIZES["num_hidden_layers"] * numbers
    assert keeping.activations - full.activations == pytest.approx(expected, rel=0.02)
    assert keeping.peak < compiled_step(graphs=graphs).peak


def compiled_step(*, graphs: bool, mode: str = "none") -> StepMemory:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    attach(model, LoRA())
    model.train()
    known: Graphs = {}
    engine = EngineSettings.model_validate(
        {"speed": "compiled" if graphs else "safe", "checkpointing": mode}
    )
    with training_blocks(
        model,
        list(model.model.layers),
        engine,
        device=torch.device("cpu"),
        stand_in=lambda block: SimulatedGraph(block, known),
    ):
        step = simulate_step(model, batch, lambda inputs: SFT().loss(model, inputs).total)
    assert all(known.values())
    return step


def test_what_a_fused_value_is_computed_from_stays_until_it_is_read() -> None:
    """The sum of two products is computed by the kernel that also reads the third."""

    def call(x: Tensor, w: Tensor) -> Tensor:
        added = x @ w + x @ w.T
        other = x @ (w @ w)
        return torch.relu(added) * other @ w

    graph = make_fx(call)(torch.ones(2, 3), torch.ones(3, 3)).graph
    written, places = _written(graph), list(graph.nodes)
    one, two, *_ = (node for node in places if node.target is torch.ops.aten.mm.default)
    (add,) = one.users
    assert add not in written
    (times,) = (node for node in places if node.target is torch.ops.aten.mul.Tensor)
    assert times in written
    last_uses = _last_uses(graph, written)
    assert {one, two, add} <= set(last_uses[times])
    freed = [node for nodes in last_uses.values() for node in nodes]
    assert sorted(freed, key=places.index) == [node for node in places if node.op != "output"]
