"""How much replies differ from each other: distinct-n and self-BLEU, over words."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from tunesmith.errors import DataError

Gram: TypeAlias = tuple[str, ...]
_ORDER: Final = 4
_NOTHING: Final = 0.1
"""Matches that stand for none, which would make the whole score 0 (NLTK's smoothing method 1)."""


def distinct(texts: Sequence[str], n: int) -> float:
    """Return the different n-grams as a share of all (Li et al. 2016, arXiv:1510.03055, sec. 5.1).

    Args:
        texts: words are what white space parts, in lower case.
        n: words in an n-gram, at least 1.

    Returns:
        0 to 1 over all texts together; NaN where no text has `n` words.
    """
    counts = Counter(gram for text in texts for gram in _grams(_words(text), n))
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU-4 of each text against all others (Zhu et al. 2018, arXiv:1802.01886).

    0 to 100; the higher, the more alike the texts are. Precisions of n-grams without a match count
    as 0.1 matches; n-grams that a text is too short for are left out.

    Raises:
        DataError: fewer than two texts.
    """
    if len(texts) < 2:
        raise DataError(f"self-BLEU compares replies with each other and got {len(texts)}")
    words = [_words(text) for text in texts]
    best = [_two_best(words, n) for n in range(1, _ORDER + 1)]
    lengths = [len(text) for text in words]
    scores = [_bleu(number, text, lengths, best) for number, text in enumerate(words)]
    return 100 * sum(scores) / len(scores)


class _Best(NamedTuple):
    """How often one text says an n-gram at most, which text, and at most among the others."""

    most: int
    owner: int
    second: int

    def without(self, text: int) -> int:
        return self.second if text == self.owner else self.most


def _two_best(texts: Sequence[Sequence[str]], n: int) -> dict[Gram, _Best]:
    """Return of each n-gram what clips it, so that no pair of texts has to be looked at."""
    best: defaultdict[Gram, _Best] = defaultdict(lambda: _Best(0, -1, 0))
    for number, text in enumerate(texts):
        for gram, count in Counter(_grams(text, n)).items():
            known = best[gram]
            if count > known.most:
                best[gram] = _Best(count, number, known.most)
            elif count > known.second:
                best[gram] = known._replace(second=count)
    return best


def _bleu(
    number: int, text: Sequence[str], lengths: Sequence[int], best: Sequence[dict[Gram, _Best]]
) -> float:
    """Return BP * exp(mean of log p_n) of one text, 0 to 1 (Papineni et al. 2002, sec. 2.3)."""
    logs = []
    for n, known in enumerate(best, start=1):
        grams = Counter(_grams(text, n))
        if not grams:
            continue
        matches = sum(min(c, known[gram].without(number)) for gram, c in grams.items())
        logs.append(math.log(max(matches, _NOTHING) / grams.total()))
    if not logs:
        return 0.0
    others = [length for at, length in enumerate(lengths) if at != number]
    closest = min(others, key=lambda length: (abs(length - len(text)), length))
    brevity = min(0.0, 1 - closest / len(text))
    return math.exp(brevity + sum(logs) / len(logs))


def _words(text: str) -> list[str]:
    return text.lower().split()


def _grams(words: Sequence[str], n: int) -> list[Gram]:
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
