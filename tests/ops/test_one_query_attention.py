"""Attention of the newest token over grouped keys."""

import pytest
import torch

from tunesmith.ops.one_query_attention import one_query_attention


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_it_is_the_plain_formula_over_repeated_keys(kv_heads: int, kind: str) -> None:
    query = torch.randn(3, 6, 1, 8, dtype=torch.float64)
    key, value = (torch.randn(3, kv_heads, 5, 8, dtype=torch.float64) for _ in range(2))
    seen = torch.rand(3, 1, 1, 5) > 0.3
    seen[..., 0] = True
    bias = torch.where(seen, 0.0, -torch.inf).double()
    mask = {"none": None, "bool": seen, "additive": bias}[kind]
    repeated = (x.repeat_interleave(6 // kv_heads, dim=1) for x in (key, value))
    k, v = repeated
    scores = 0.3 * query @ k.transpose(-1, -2) + (0 if kind == "none" else bias)
    expected = scores.softmax(-1) @ v
    found = one_query_attention(query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)
