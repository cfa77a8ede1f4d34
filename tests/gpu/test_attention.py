"""Kernels of attention on a GPU: against the plain formula, packed as separate, as one graph."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tunesmith.models.attention_choice import AttentionChoice, known
from tunesmith.ops.attention_choice import CANDIDATES, Backend, Shape, attend, fastest
from tunesmith.ops.equal_segments import equal_segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# bfloat16 keeps 8 bits, and the kernels sum in another order.
CLOSE = {"rtol": 0.02, "atol": 0.02}


def inputs(segments: int, length: int, head_dim: int = 64) -> list[Tensor]:
    tokens = segments * length
    shapes = [(1, tokens, heads, head_dim) for heads in (8, 2, 2)]
    made = [torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for s in shapes]
    return [x.requires_grad_() for x in made]


def plain(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Causal attention within segments, in float32, from one mask."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    place = torch.arange(q.shape[2], device=q.device)
    seen = (place[:, None] // length == place // length) & (place[:, None] >= place)
    scores = q.float() @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("backend", CANDIDATES)
@pytest.mark.parametrize(("segments", "length"), [(1, 257), (3, 64), (2, 1000)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_values_and_gradients_are_those_of_the_plain_formula(
    backend: Backend, segments: int, length: int, head_dim: int
) -> None:
    leaves = inputs(segments, length, head_dim)
    try:
        got = attend(*leaves, length, backend=backend)
    except RuntimeError as error:
        pytest.skip(f"{backend} cannot do this shape here: {error}")
    expected = plain(*leaves, length)
    torch.testing.assert_close(got.float(), expected, **CLOSE)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((got.float() * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for mine, its in zip(ours, theirs, strict=True):
        relative = (mine.float() - its.float()).norm() / its.float().norm()
        assert relative < 0.02


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_a_prefix_is_seen_by_every_segment(backend: Backend) -> None:
    q, k, v = inputs(3, 96)
    prefix = tuple(torch.randn(1, 2, 20, 64, device="cuda", dtype=q.dtype) for _ in range(2))
    got = equal_segments(q, k, v, 96, backend=backend, prefix=prefix)
    expected = equal_segments(q, k, v, 96, backend="math", prefix=prefix)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_the_kernel_stays_the_same_inside_a_graph(backend: Backend) -> None:
    torch.compiler.reset()
    call = torch.compile(equal_segments, fullgraph=True, dynamic=True)
    for length in (64, 96, 128):
        leaves = inputs(2, length)
        got = call(*leaves, length, backend=backend)
        torch.testing.assert_close(
            got, equal_segments(*leaves, length, backend=backend, or_another=False), **CLOSE
        )


def test_the_fastest_kernel_is_measured_once_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    shape = Shape(2, 1024, 8, 2, 64, torch.bfloat16)
    measured = fastest(shape, torch.device("cuda"))
    assert measured
    assert list(measured.values()) == sorted(measured.values())

    class Model:
        dtype = torch.bfloat16

        class config:  # noqa: N801 - what transformers calls it
            num_attention_heads, num_key_value_heads, head_dim = 8, 2, 64

            @classmethod
            def get_text_config(cls) -> type:
                return cls

    device = torch.device("cuda")
    chosen = AttentionChoice(Model()).backend(2, 1024, 2048, device)  # type: ignore[arg-type]
    assert next(iter(known(shape, device))) == chosen
