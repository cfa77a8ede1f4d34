"""Replies against reference texts: BLEU, ROUGE-L, exact match."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError, SetupError

_HAN: Final = (
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"  # Han
)
_NO_SPACES: Final = _HAN + (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
)
_ENDS: Final = " .,;:!?\"'`()[]\u3001\u3002\u300c\u300d\u2018\u2019\u201c\u201d\u00ab\u00bb"
"""Punctuation around an answer; no minus, percent or currency sign, which belong to it."""


def bleu(replies: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU-4 (Papineni et al. 2002), 0 to 100, as sacrebleu computes it.

    Texts with Chinese or Japanese characters are tokenised by character (sacrebleu's `zh`), others
    by its default `13a`.

    Args:
        replies: one text per prompt.
        references: the good replies to each prompt, at least one; their number may differ.

    Raises:
        DataError: no replies, or a prompt without reference.
        SetupError: sacrebleu is not installed.
    """
    return bleu_of_counts(bleu_counts(replies, references))


def bleu_counts(replies: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """Return what each reply adds to corpus BLEU, (replies, 10) int64.

    BLEU is a function of sums over the corpus, so that of any choice of replies comes out of these
    without counting n-grams again. The columns: n-grams of length 1 to 4 that a reference has too,
    n-grams of length 1 to 4, tokens, tokens of the reference whose length is nearest.

    Raises:
        DataError: no replies, or a prompt without reference.
        SetupError: sacrebleu is not installed.
    """
    _require_references(replies, references)
    by_character = any(re.search(f"[{_HAN}]", text) for row in references for text in row)
    scorer = _load("sacrebleu").BLEU(tokenize="zh" if by_character else "13a", force=True)
    scores = (
        scorer.corpus_score([reply], [[text] for text in row])
        for reply, row in zip(replies, references, strict=True)
    )
    rows = [[*found.counts, *found.totals, found.sys_len, found.ref_len] for found in scores]
    return np.asarray(rows, dtype=np.int64)


def bleu_of_counts(counts: NDArray[np.int64]) -> float:
    """Return corpus BLEU-4, 0 to 100, of replies whose `bleu_counts` these are, (replies, 10)."""
    *ngrams, length, reference_length = counts.sum(axis=0).tolist()
    score = _load("sacrebleu").BLEU.compute_bleu(
        ngrams[:4], ngrams[4:], length, reference_length, smooth_method="exp"
    )
    return float(score.score)


def rouge_l(replies: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean ROUGE-L F1 (Lin 2004), 0 to 1, each reply against its best reference.

    Computed by rouge-score, whose own tokenizer drops everything but a-z and 0-9; here words are of
    any script, with the marks on their letters, and Chinese, Japanese, Thai, Lao, Burmese and
    Khmer count by character.

    Raises:
        DataError: no replies, or a prompt without reference.
        SetupError: rouge-score is not installed.
    """
    _require_references(replies, references)
    scoring = _load("rouge_score.rouge_scorer", package="rouge-score")
    scorer = scoring.RougeScorer(["rougeL"], tokenizer=_Words())
    best = (
        max(scorer.score(reference, reply)["rougeL"].fmeasure for reference in row)
        for reply, row in zip(replies, references, strict=True)
    )
    return float(sum(best) / len(replies))


def exact_match(replies: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the share of replies, 0 to 1, that equal a reference after normalising both.

    Case, Unicode form, runs of white space and punctuation at the ends do not count.

    Raises:
        DataError: no replies, or a prompt without reference.
    """
    _require_references(replies, references)
    matches = (
        normalised(reply) in {normalised(reference) for reference in row}
        for reply, row in zip(replies, references, strict=True)
    )
    return sum(matches) / len(replies)


def normalised(text: str) -> str:
    """Return `text` in lower case and NFKC, single spaces, no punctuation at its ends."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    # A reply that is punctuation alone ("?") is still a reply.
    return words.strip(_ENDS) or words


class _Words:
    """Splits a text for rouge-score: words in lower case, characters where no spaces are used."""

    def tokenize(self, text: str) -> list[str]:
        return _word().findall(unicodedata.normalize("NFC", text.lower()))


@cache
def _word() -> re.Pattern[str]:
    r"""Return what a word is: letters and digits with their marks, or one letter without spaces.

    Marks are the vowel signs of most scripts of India and the accents that no letter has by itself;
    `\w` leaves them out, so that words that differ in them alone would be the same.
    """
    every = map(chr, range(sys.maxunicode + 1))
    marks = "".join(char for char in every if unicodedata.category(char).startswith("M"))
    letter = rf"[^\W_{_NO_SPACES}]"
    return re.compile(rf"[{_NO_SPACES}][{marks}]*|{letter}(?:{letter}|[{marks}])*")


def _load(module: str, *, package: str | None = None) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise SetupError(
            f"the package {package or module} is not installed; pip install tunesmith[metrics]"
        ) from error


def _require_references(replies: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not replies:
        raise DataError("there are no replies to score; the evaluation data has no prompt")
    if len(replies) != len(references):
        raise DataError(f"there are {len(replies)} replies but {len(references)} references")
    for index, row in enumerate(references):
        if not row:
            raise DataError(f"prompt {index} has no reference text to compare its reply with")
