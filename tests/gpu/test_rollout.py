"""Roll-outs on CUDA: the graph of a step, the compiled step and its kernel do what plain code does.

In float32: where bfloat16 rounds otherwise, a sampled token may be another one.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tiny import tiny_gpt2, tiny_llama
from tunesmith import LoRA, attach
from tunesmith.models.attention import enable_segments
from tunesmith.ops.one_query_attention import one_query_attention
from tunesmith.rollout.draw import Drawing, row_seeds
from tunesmith.rollout.sample import Reply, Stops, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[5, 9, 11], [7, 30, 31, 32, 40, 41, 8], [90], list(range(10, 130))]
SEEDS = row_seeds(3, range(4))


def tuned(make: Callable[..., torch.nn.Module] = tiny_llama) -> torch.nn.Module:
    """A tiny model on the GPU with the roll-outs' attention and a LoRA that does something."""
    model = make()
    enable_segments(model)
    torch.manual_seed(1)
    attach(model, LoRA(rank=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.cuda()


def replies(model: torch.nn.Module, **changes: object) -> list[Reply]:
    settings: dict[str, object] = {
        "prompts": PROMPTS,
        "seeds": SEEDS,
        "max_new_tokens": 40,  # beyond the first 128 columns
        "stops": Stops(),
        "pad_token_id": 2,
    }
    return sample(model, **(settings | changes))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_graph_of_a_step_gives_what_a_growing_cache_does(
    make: Callable[..., torch.nn.Module], compiled: bool
) -> None:
    model = tuned(make)
    growing = replies(model, decoding="growing")
    fixed = replies(model, decoding="fixed", compiled=compiled)
    assert [r.tokens for r in fixed] == [r.tokens for r in growing]
    for one, other in zip(fixed, growing, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_log_probs_agree_with_the_training_forward(compiled: bool) -> None:
    model = tuned()
    for prompt, reply in zip(PROMPTS, replies(model, compiled=compiled), strict=True):
        ids = torch.tensor([prompt + reply.tokens], device="cuda")
        logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(reply.tokens, device="cuda")[:, None])[:, 0]
        found = torch.tensor(reply.log_probs, device="cuda")
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_row_is_the_same_in_any_batch() -> None:
    model = tuned()
    together = replies(model, compiled=True)
    backwards = replies(
        model, prompts=PROMPTS[::-1], seeds=SEEDS[::-1], batch_size=3, compiled=True
    )[::-1]
    assert [r.tokens for r in together] == [r.tokens for r in backwards]
    assert len({tuple(r.tokens) for r in together}) == 4


def test_a_graph_is_of_the_weights_as_they_are_then() -> None:
    model = tuned()
    before = replies(model, compiled=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    after = replies(model, compiled=True)
    assert [r.tokens for r in after] == [r.tokens for r in replies(model, decoding="growing")]
    assert [r.tokens for r in after] != [r.tokens for r in before]


def test_a_stop_token_ends_a_row() -> None:
    model = tuned()
    whole = replies(model)
    stop = whole[1].tokens[20]
    cut = replies(model, stops=Stops(tokens=frozenset({stop})))
    for before, after in zip(whole, cut, strict=True):
        end = before.tokens.index(stop) + 1 if stop in before.tokens else 40
        assert after.tokens == before.tokens[:end]


@pytest.mark.parametrize(("kv_heads", "width"), [(1, 32), (2, 64), (6, 128)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_plain_formula(
    kv_heads: int, width: int, masked: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 1, 6, width).transpose(1, 2)
    key, value = (torch.randn(3, kv_heads, 200, width) for _ in range(2))
    mask = torch.rand(3, 1, 1, 200) > 0.3
    mask[1, ..., :130], mask[..., 199] = False, True
    inputs = [x.cuda().to(dtype) for x in (query, key, value)]
    seen = mask.cuda() if masked else None
    found = one_query_attention(*inputs, seen, scaling=0.3)
    expected = plain(*(x.double() for x in inputs), seen)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE[dtype])


TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    # The weights are rounded to bfloat16 before they meet the values: 2^-9 of the largest value.
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
}


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    k, v = (x.repeat_interleave(6 // key.shape[1], dim=1) for x in (key, value))
    scores = 0.3 * query @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("drawing", [Drawing(), Drawing(0.7), Drawing(0.7, 0.9, 50)])
def test_drawing_is_the_same_on_both_devices(drawing: Drawing) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(512, 5003)
    step, seeds = torch.tensor(4), torch.tensor(row_seeds(3, range(512)))
    here = drawing(logits, seeds, step)
    there = drawing(logits.cuda(), seeds.cuda(), step.cuda())
    # Sums round otherwise: a number on the very border of two tokens may fall to the other.
    assert float((here.tokens != there.tokens.cpu()).float().mean()) < 0.01
    same = here.tokens == there.tokens.cpu()
    torch.testing.assert_close(here.log_probs[same], there.log_probs.cpu()[same])
