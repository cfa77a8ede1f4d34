"""Drawing tokens from logits with noise that belongs to the row and not to the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN: Final = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number of 64 bits
_FIRST: Final = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND: Final = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_BITS: Final = 24
"""Of a uniform number: as many as float32 tells apart below 1."""


class Drawn(NamedTuple):
    """What came of one step of sampling."""

    tokens: Tensor
    """(rows,) int64."""
    log_probs: Tensor
    """(rows,) float32: log p of the tokens at temperature 1 over the whole vocabulary, in nats."""


class Drawing(NamedTuple):
    """How tokens are chosen."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Among the most likely tokens that together have this probability."""
    top_k: int = 0
    """Among so many most likely tokens; 0 is all."""

    def __call__(self, logits: Tensor, seeds: Tensor, step: Tensor) -> Drawn:
        """Draw a token for each row, by the inverse of the distribution function.

        Row i's token is a function of its own logits, `seeds[i]` and `step` alone, so the other
        rows of the batch and their order do not matter. Plain tensor code: nothing waits.

        Args:
            logits: (rows, vocab) float.
            seeds: (rows,) int64.
            step: () int64, the place of the token in the reply.
        """
        logits = logits.float()
        log_sum = logits.logsumexp(-1)
        if self.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            probs = self._kept(logits / self.temperature).softmax(-1)
            below = probs.cumsum(-1)
            # u < 1 strictly, so that the place lies before the end of the last kept token.
            place = uniform(seeds, step)[:, None] * below[:, -1:]
            found = torch.searchsorted(below, place, right=True)[:, 0]
            tokens = found.clamp(max=logits.shape[-1] - 1)
        return Drawn(tokens, logits.gather(-1, tokens[:, None])[:, 0] - log_sum)

    def _kept(self, logits: Tensor) -> Tensor:
        """Return `logits` with -inf where top_k and top_p leave a token out."""
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, places = logits.sort(dim=-1, descending=True, stable=True)
            probs = ordered.softmax(-1)
            # A token is kept while those before it have not reached top_p: the first always is.
            left_out = probs.cumsum(-1) - probs >= self.top_p
            left_out = torch.zeros_like(left_out).scatter(-1, places, left_out)
            logits = logits.masked_fill(left_out, -torch.inf)
        return logits


def uniform(seeds: Tensor, step: Tensor) -> Tensor:
    """Return numbers in [0, 1), (rows,) float32, that a row's seed and the step alone decide.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", fig. 13) over a counter, twice: of the seed, and then of seed and step.

    Args:
        seeds: (rows,) int64.
        step: () int64.
    """
    bits = _mix(_mix(seeds * _GOLDEN) + (step + 1) * _GOLDEN)
    return _shifted(bits, 64 - _BITS).to(torch.float32) / 2**_BITS


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return the 64 bits shifted right with zeros behind them; torch's own copies the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def row_seeds(seed: int, rows: range) -> list[int]:
    """Return a seed for each of the run's replies, numbered from its start.

    Args:
        seed: of the run.
        rows: numbers of the replies.
    """
    numbers = torch.tensor(list(rows), dtype=torch.int64)
    mixed: list[int] = _mix(_mix(torch.tensor(seed) * _GOLDEN + 1) + numbers * _GOLDEN).tolist()
    return mixed
