"""Segments against a plain masked softmax in float64."""

import pytest
import torch
from torch import Tensor

from tunesmith.ops.segment_attention import _before_each, segment_attention, uses_varlen

LENGTHS = (1, 5, 2, 9)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


sights = pytest.mark.parametrize(
    ("causal", "window"),
    [(True, None), (True, 3), (True, 1), (False, None), (False, 3), (False, 1)],
)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(1, heads, sum(lengths), HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool,
    window: int | None = None,
    scaling: float = HEAD_DIM**-0.5,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One softmax over all tokens, everything outside the own segment and prefix masked out."""
    extra = 0 if prefix is None else prefix[0].shape[2]
    if prefix is not None:
        k, v = torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = segment[:, None] == segment[None]
    distance = torch.arange(len(segment))[:, None] - torch.arange(len(segment))[None]
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance.abs() < window)
    seen = torch.nn.functional.pad(seen, (extra, 0), value=True)
    scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (1, 1, 1), (3, 3, 3)])
@sights
def test_each_segment_sees_only_itself(
    lengths: tuple[int, ...], *, causal: bool, window: int | None
) -> None:
    q, k, v = inputs(lengths)
    got = segment_attention(q, k, v, bounds(lengths), causal=causal, window=window)
    expected = plain(q, k, v, lengths, causal=causal, window=window)
    torch.testing.assert_close(got, expected)


def in_front(extra: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    k, v = (
        torch.randn(1, KV_HEADS, extra, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    return k, v


@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (1, 1, 1)])
@sights
def test_each_segment_sees_the_prefix_besides(
    lengths: tuple[int, ...], *, causal: bool, window: int | None
) -> None:
    tensors, prefix = inputs(lengths), in_front(3)
    settings = {"causal": causal, "window": window, "prefix": prefix}
    got = segment_attention(*tensors, bounds(lengths), **settings)
    expected = plain(*tensors, lengths, **settings)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), (*tensors, *prefix)),
        torch.autograd.grad(expected.square().sum(), (*tensors, *prefix)),
    )


def test_the_kernels_keys_begin_with_the_prefix_in_every_segment() -> None:
    order, new_bounds = _before_each(bounds((1, 3, 2)), extra=2, tokens=6)
    # 0 and 1 are the prefix, 2 to 7 the tokens
    assert order.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 0, 1, 6, 7]
    assert new_bounds.tolist() == [0, 3, 8, 12]
    assert new_bounds.dtype == torch.int32


def test_gradients_equal_those_of_the_plain_formula() -> None:
    q, k, v = inputs(LENGTHS)
    weight = torch.randn(1, HEADS, sum(LENGTHS), HEAD_DIM, dtype=torch.float64)
    got = segment_attention(q, k, v, bounds(LENGTHS), scaling=0.7)
    expected = plain(q, k, v, LENGTHS, causal=True, scaling=0.7)
    torch.testing.assert_close(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
    )


def test_gradcheck() -> None:
    lengths = (1, 3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: segment_attention(q, k, v, bounds(lengths)), inputs(lengths)
    )


def test_tokens_of_another_segment_do_not_change_the_result() -> None:
    q, k, v = (x.detach() for x in inputs(LENGTHS, torch.float32))
    before = segment_attention(q, k, v, bounds(LENGTHS))
    for x in (q, k, v):
        x[:, :, :6] = torch.randn_like(x[:, :, :6])
    after = segment_attention(q, k, v, bounds(LENGTHS))
    assert torch.equal(before[:, :, 6:], after[:, :, 6:])


def test_non_contiguous_inputs_give_the_same() -> None:
    q, k, v = inputs(LENGTHS)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(
        segment_attention(*strided, bounds(LENGTHS)), segment_attention(q, k, v, bounds(LENGTHS))
    )


def test_bfloat16_stays_bfloat16_and_close_to_float64() -> None:
    q, k, v = inputs(LENGTHS)
    got = segment_attention(*(x.bfloat16() for x in (q, k, v)), bounds(LENGTHS))
    assert got.dtype == torch.bfloat16
    expected = plain(q, k, v, LENGTHS, causal=True)
    # bfloat16 keeps 8 bits, and the inputs themselves were rounded.
    torch.testing.assert_close(got.double(), expected, rtol=0.05, atol=0.05)


def test_dropout_drops_whole_weights_and_scales_up_the_rest() -> None:
    """The first token of a segment has one weight, 1: it is dropped (0) or doubled (2 v)."""
    q, k, v = inputs((1,) * 64)
    got = segment_attention(q, k, v, bounds((1,) * 64), dropout=0.5)
    doubled = 2 * v.repeat_interleave(HEADS // KV_HEADS, dim=1)
    kept = (got != 0).all(-1, keepdim=True)
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(got, torch.where(kept, doubled, 0))


def test_the_cpu_does_not_use_the_variable_length_kernel() -> None:
    q, _, v = inputs(LENGTHS, torch.bfloat16)
    assert not uses_varlen(q, v)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("causal", "window", "extra"),
    [
        (True, None, 0),
        (True, 3, 0),
        (False, None, 0),
        (False, 3, 0),
        (True, None, 3),
        (False, None, 3),
    ],
)
def test_the_variable_length_kernel_equals_the_plain_formula(
    *, causal: bool, window: int | None, extra: int
) -> None:
    drawn = [*inputs(LENGTHS), *(in_front(extra) if extra else ())]
    halves = [x.detach().bfloat16() for x in drawn]
    on_gpu = [x.cuda().requires_grad_() for x in halves]
    assert uses_varlen(on_gpu[0], on_gpu[2])
    settings = {"causal": causal, "window": window}
    got = segment_attention(
        *on_gpu[:3],
        bounds(LENGTHS).cuda(),
        max_length=max(LENGTHS),
        prefix=(on_gpu[3], on_gpu[4]) if extra else None,
        **settings,
    )
    exact = [x.double().requires_grad_() for x in halves]
    prefix = (exact[3], exact[4]) if extra else None
    expected = plain(*exact[:3], LENGTHS, prefix=prefix, **settings)
    # bfloat16 keeps 8 bits.
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(got.float().square().sum(), on_gpu)
    references = torch.autograd.grad(expected.square().sum(), exact)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient.cpu().double(), reference, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("window", [None, 2])
def test_capped_scores_are_the_formula_in_every_segment(window: int | None, extra: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, 4, generator=generator, dtype=torch.float64)

    lengths = [3, 1, 5]
    q, k, v = draw(4, 9), draw(2, 9), draw(2, 9)
    prefix = (draw(2, extra), draw(2, extra)) if extra else None
    bounds = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    got = segment_attention(q, k, v, bounds, scaling=0.7, window=window, prefix=prefix, softcap=1.5)
    for part, own_k, own_v, out in zip(
        *(x.split(lengths, dim=2) for x in (q, k, v, got)), strict=True
    ):
        keys = own_k if prefix is None else torch.cat([prefix[0], own_k], dim=2)
        values = own_v if prefix is None else torch.cat([prefix[1], own_v], dim=2)
        for head in range(4):
            for i in range(part.shape[2]):
                first = 0 if window is None else max(0, i - window + 1)
                seen = [*range(extra), *range(extra + first, extra + i + 1)]
                scores = 1.5 * torch.tanh(0.7 * keys[0, head // 2, seen] @ part[0, head, i] / 1.5)
                expected = scores.softmax(0) @ values[0, head // 2, seen]
                # the weights are float32, as in transformers
                torch.testing.assert_close(out[0, head, i], expected, atol=1e-6, rtol=1e-6)
