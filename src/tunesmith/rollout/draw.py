"""Drawing tokens from logits with noise that belongs to the row and not to the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN: Final = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number of 64 bits
_FIRST: Final = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND: Final = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_BITS: Final = 24
"""Of a uniform number: as many as float32 tells apart below 1."""
_STRETCH: Final = 128
"""Tokens of the vocabulary that are looked at one by one."""


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
        largest = logits.amax(-1, keepdim=True).float()
        sums = _sums(logits, largest)
        log_sum = largest[:, 0] + sums.sum(-1).log()
        if self.temperature == 0:
            tokens = logits.argmax(-1)
        elif self._is_plain(logits):
            tokens = _found(logits, largest, sums, uniform(seeds, step))
        else:
            scores = self._kept(logits.float() / self.temperature)
            most = scores.amax(-1, keepdim=True)
            tokens = _found(scores, most, _sums(scores, most), uniform(seeds, step))
        return Drawn(tokens, logits.gather(-1, tokens[:, None])[:, 0].float() - log_sum)

    def _is_plain(self, logits: Tensor) -> bool:
        cuts = self.top_p < 1 or 0 < self.top_k < logits.shape[-1]
        return self.temperature == 1 and not cuts

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


def _sums(scores: Tensor, largest: Tensor) -> Tensor:
    """Return the sums of exp(score - largest) over stretches of the vocabulary.

    A token is then found by a look at these and at one stretch: running sums over the vocabularies
    of all rows would take as long as the model.

    Args:
        scores: (rows, vocab) float.
        largest: (rows, 1) float32.

    Returns:
        (rows, stretches) float32.
    """
    weights = (scores.float() - largest).exp()
    if missing := -weights.shape[-1] % _STRETCH:
        weights = F.pad(weights, (0, missing))
    return weights.reshape(weights.shape[0], -1, _STRETCH).sum(-1)


def _found(scores: Tensor, largest: Tensor, sums: Tensor, share: Tensor) -> Tensor:
    """Return the tokens, (rows,) int64, at which the share (rows,) of all weight is reached."""
    stretch, rest = _reached(sums, share * sums.sum(-1))
    tokens = stretch[:, None] * _STRETCH + torch.arange(_STRETCH, device=scores.device)
    there = tokens < scores.shape[-1]
    some = scores.gather(-1, tokens.clamp(max=scores.shape[-1] - 1)).float()
    inside, _ = _reached(torch.where(there, (some - largest).exp(), 0.0), rest)
    return stretch * _STRETCH + inside


def _reached(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the running sums of `weights` (rows, n) go beyond `target`, and what is left.

    A weight of 0 is never the place, however sums round.
    """
    sums = weights.cumsum(-1)
    beyond = torch.where(weights > 0, sums, 0.0)
    target = torch.minimum(target, beyond.amax(-1) * (1 - 2**-_BITS))
    # The first of equal ones is what argmax gives.
    place = (beyond > target[:, None]).to(torch.uint8).argmax(-1, keepdim=True)
    before = (sums - weights).gather(-1, place)[:, 0]
    return place[:, 0], (target - before).clamp(min=0)


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
