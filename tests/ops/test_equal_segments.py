"""Segments of one length as a dense batch, against the segments one by one."""

import pytest
import torch
from torch import Tensor

from tunesmith.ops.equal_segments import equal_segments
from tunesmith.ops.segment_attention import segment_attention

SEGMENTS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 8


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tokens = SEGMENTS * length
    shapes = [(1, tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    # As projections give them: heads behind the tokens.
    return [torch.randn(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


def bounds(length: int) -> Tensor:
    return torch.arange(0, SEGMENTS * length + 1, length, dtype=torch.int32)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_values_and_gradients_are_those_of_the_segments_one_by_one(
    length: int, extra: int, *, causal: bool
) -> None:
    q, k, v = inputs(length)
    prefix = None
    leaves = [q, k, v]
    if extra:
        shape = (1, KV_HEADS, extra, HEAD_DIM)
        prefix = tuple(torch.randn(shape, dtype=q.dtype, requires_grad=True) for _ in range(2))
        leaves += prefix
    options = {"scaling": 0.4, "causal": causal, "prefix": prefix}
    ours = equal_segments(q, k, v, length, backend="math", **options)
    expected = segment_attention(q, k, v, bounds(length), **options)
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
    )


def test_gradcheck() -> None:
    q, k, v = inputs(2)
    assert torch.autograd.gradcheck(
        lambda *x: equal_segments(*x, 2, backend="math", prefix=(x[1][:, :, :1], x[2][:, :, :1])),
        (q, k, v),
    )


def test_another_kernel_is_taken_where_this_one_cannot() -> None:
    q, k, v = inputs(4)  # there is no cuDNN on the CPU
    expected = segment_attention(q, k, v, bounds(4))
    torch.testing.assert_close(equal_segments(q, k, v, 4, backend="cudnn"), expected)


def test_one_graph_serves_every_length() -> None:
    torch.compiler.reset()
    call = torch.compile(equal_segments, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 6, 9):
        q, k, v = inputs(length, torch.float32)
        expected = segment_attention(q, k, v, bounds(length))
        with torch.compiler.set_stance("fail_on_recompile" if length == 9 else "default"):
            got = call(q, k, v, length, backend="math")
        torch.testing.assert_close(got, expected)
