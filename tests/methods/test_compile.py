"""LoRA inside compiled blocks: one graph, and the switch still works."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith.methods import LoRA
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

METHODS = {
    tiny_llama: LoRA(rank=4, dropout=0.0),
    tiny_gpt2: LoRA(rank=4, targets=["attention.q", "mlp.down"], bias="all"),
}


def compile_blocks(model: PreTrainedModel, backend: str) -> None:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(fullgraph=True, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "backend"),
    [(tiny_llama, "aot_eager"), (tiny_gpt2, "aot_eager"), (tiny_gpt2, "inductor")],
)
def test_compiled_blocks_are_one_graph_with_equal_outputs_and_gradients(
    make: Callable[[], PreTrainedModel],
    backend: str,
    input_ids: Tensor,
    trained: Trained,
    loss: Loss,
) -> None:
    torch._dynamo.reset()
    model = make()
    tuned = trained(attach(model, METHODS[make]))
    eager = model(input_ids).logits
    loss(model, input_ids).backward()
    gradients = {name: p.grad.clone() for name, p in tuned.trainable().items()}
    model.zero_grad()

    compile_blocks(model, backend)
    compiled = model(input_ids).logits
    loss(model, input_ids).backward()

    # the compiler may fuse and so reorder float32 sums
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
    for name, parameter in tuned.trainable().items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", METHODS, ids=["llama", "gpt2"])
def test_switching_off_and_on_works_after_compiling(
    make: Callable[[], PreTrainedModel], input_ids: Tensor, trained: Trained
) -> None:
    torch._dynamo.reset()
    model = make()
    base = model(input_ids).logits
    tuned = trained(attach(model, METHODS[make]))
    adapted = model(input_ids).logits
    compile_blocks(model, "aot_eager")
    for _ in range(2):
        torch.testing.assert_close(model(input_ids).logits, adapted)
        with tuned.disabled():
            torch.testing.assert_close(model(input_ids).logits, base)


@pytest.mark.slow
def test_switching_makes_one_graph_more_and_no_further_one(
    input_ids: Tensor, trained: Trained
) -> None:
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=1)
    tuned = trained(attach(model, LoRA(rank=4)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model.model.layers[0].compile(fullgraph=True, backend=counter)
    for _ in range(3):
        model(input_ids)
        with tuned.disabled():
            model(input_ids)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_detaching_takes_effect_in_compiled_blocks(input_ids: Tensor, trained: Trained) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    base = model(input_ids).logits
    tuned = trained(attach(model, LoRA(rank=4)))
    compile_blocks(model, "eager")
    assert not torch.equal(model(input_ids).logits, base)
    torch.testing.assert_close(tuned.detach()(input_ids).logits, base)
