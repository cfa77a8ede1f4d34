"""Diversity of replies against values worked out by hand."""

import math

import pytest

from tunesmith.errors import DataError
from tunesmith.measure.diversity import distinct, self_bleu


def test_distinct_counts_different_ngrams_over_all_replies() -> None:
    """a b a | a b: words a b a a b (2 of 5); pairs ab ba ab (2 of 3)."""
    texts = ["a b A", "a b"]
    assert distinct(texts, 1) == pytest.approx(2 / 5)
    assert distinct(texts, 2) == pytest.approx(2 / 3)


def test_distinct_of_replies_that_are_too_short_is_not_a_number() -> None:
    assert math.isnan(distinct(["a", ""], 2))


def test_self_bleu_of_equal_replies_is_100() -> None:
    assert self_bleu(["the cat sat down"] * 3) == pytest.approx(100)


def test_self_bleu_against_a_value_worked_out_by_hand() -> None:
    """Of `a b c d` against `a b c e`: p1 = 3/4, p2 = 2/3, p3 = 1/2, p4 = 0.1/1, no brevity penalty.

    The other text gives the same, so the mean is (3/4 * 2/3 * 1/2 * 1/10) ** (1/4).
    """
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx(100 * (1 / 40) ** 0.25)


def test_self_bleu_clips_by_the_other_replies_and_punishes_brevity() -> None:
    """`a a`: p1 = 1/2 (clipped by one a), p2 = 0.1/1; closest length 3, so exp(1 - 3/2).

    `a b c`: p1 = 1/3, p2 = 0.1/2, p3 = 0.1/1; longer than `a a`, so no penalty.
    """
    short = math.exp(-0.5) * (1 / 2 * 0.1) ** (1 / 2)
    long = (1 / 3 * 0.1 / 2 * 0.1) ** (1 / 3)
    assert self_bleu(["a a", "a b c"]) == pytest.approx(100 * (short + long) / 2)


def test_a_reply_is_not_compared_with_itself() -> None:
    assert self_bleu(["a b c d e", "v w x y z"]) < 5


def test_an_empty_reply_scores_nothing() -> None:
    assert self_bleu(["", "a b"]) == pytest.approx(100 * (0 + (0.1 / 2 * 0.1) ** 0.5) / 2)


def test_one_reply_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="got 1"):
        self_bleu(["a"])
