"""The matrix's cell of compilation: a block with a method in it is one graph."""

from typing import Final

import torch
from torch import Tensor

from families import FAMILIES
from numerics.matrix import COMPILED, IDS, cells, trained, tuned_of
from tunesmith.methods.tuned import TunedModel

SAMPLE: Final = [("lora", "llama"), ("adapter", "gpt2"), ("prefix_tuning", "llama")]


def outcome(family: str, tuned: TunedModel) -> dict[str, Tensor]:
    """Return the logits and the gradient of every trainable that has one."""
    torch.manual_seed(3)  # random gates draw the same each time
    tuned.model.zero_grad()
    out = tuned.model(**FAMILIES[family].inputs(IDS), labels=IDS)
    out.loss.backward()
    found = {n: p.grad.clone() for n, p in tuned.trainable().items() if p.grad is not None}
    return found | {"logits": out.logits.detach()}


@cells("compiled", families=COMPILED, sample=SAMPLE)
def test_a_block_is_one_graph_with_equal_logits_and_gradients(family: str, method: str) -> None:
    torch._dynamo.reset()
    tuned = trained(tuned_of(family, method))
    expected = outcome(family, tuned)
    block = tuned.model.get_submodule(tuned.sites.blocks[0].path)
    block.compile(fullgraph=True, backend="aot_eager")
    # the compiler may fuse and so reorder float32 sums
    torch.testing.assert_close(outcome(family, tuned), expected, atol=1e-5, rtol=1e-4)
