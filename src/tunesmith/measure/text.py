"""Replies against reference texts: BLEU, ROUGE-L, exact match."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from types import ModuleType
from typing import Final

from tunesmith.errors import DataError, SetupError

_NO_SPACES: Final = (
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"  # Han
)
_WORD: Final = re.compile(rf"[{_NO_SPACES}]|[^\W_{_NO_SPACES}]+")
_ENDS: Final = " .,;:!?\"'`()[]\u3001\u3002\u300c\u300d\u2018\u2019\u201c\u201d\u00ab\u00bb"
"""Punctuation around an answer; no minus, percent or currency sign, which belong to it."""
_HAN: Final = re.compile(rf"[{_NO_SPACES}]")


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
    _require_references(replies, references)
    sacrebleu = _load("sacrebleu")
    most = max(map(len, references))
    # One list per reference number, as long as the corpus; None where a prompt has fewer.
    streams = [[row[n] if n < len(row) else None for row in references] for n in range(most)]
    by_character = any(_HAN.search(text) for row in references for text in row)
    score = sacrebleu.corpus_bleu(list(replies), streams, tokenize="zh" if by_character else "13a")
    return float(score.score)


def rouge_l(replies: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean ROUGE-L F1 (Lin 2004), 0 to 1, each reply against its best reference.

    Computed by rouge-score, whose own tokenizer drops everything but a-z and 0-9; here words are of
    any script, and Chinese and Japanese count by character.

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
        return _WORD.findall(text.lower())


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
