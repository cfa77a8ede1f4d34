"""Text metrics against the definitions and the libraries' own values."""

import sys

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from tunesmith.errors import DataError, SetupError
from tunesmith.measure.text import (
    bleu,
    bleu_counts,
    bleu_of_counts,
    exact_match,
    normalised,
    rouge_l,
)

REPLIES = ["the cat sat on the mat today", "there is a dog in the old garden"]
REFERENCES = [
    ["the cat sat on a mat today", "a cat is sitting on the mat"],
    ["there is a dog in the garden"],
]
CHINESE = "\u4eca\u5929\u5929\u6c14\u5f88\u597d"
CHINESE_BUT_ONE = "\u4eca\u5929\u5929\u6c14\u4e0d\u597d"


def test_bleu_is_that_of_sacrebleu_with_references_of_unequal_number() -> None:
    streams = [[row[0] for row in REFERENCES], [REFERENCES[0][1], None]]
    expected = sacrebleu.BLEU().corpus_score(REPLIES, streams).score
    assert bleu(REPLIES, REFERENCES) == pytest.approx(expected)
    assert 0 < expected < 100


def test_bleu_of_a_perfect_chinese_reply_is_100_and_of_a_near_one_above_0() -> None:
    assert bleu([CHINESE], [[CHINESE]]) == pytest.approx(100)
    assert 0 < bleu([CHINESE * 2], [[CHINESE + CHINESE_BUT_ONE]]) < 100


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["a", "b", "cat.", "1,000", "d-e"]), max_size=8),
            st.lists(
                st.lists(st.sampled_from(["a", "b", "cat.", "1,000", "d-e"]), min_size=1),
                min_size=1,
            ),
        ),
        min_size=2,
        max_size=5,
    ),
    st.lists(st.integers(0, 1), min_size=1, max_size=6),
)
def test_counts_of_chosen_replies_give_sacrebleus_score_of_exactly_those(
    rows: list[tuple[list[str], list[list[str]]]], chosen: list[int]
) -> None:
    replies = [" ".join(reply) for reply, _ in rows]
    references = [[" ".join(text) for text in texts] for _, texts in rows]
    most = max(len(references[i]) for i in chosen)
    streams = [
        [references[i][n] if n < len(references[i]) else None for i in chosen] for n in range(most)
    ]
    expected = sacrebleu.BLEU().corpus_score([replies[i] for i in chosen], streams).score
    counts = bleu_counts(replies, references)
    assert counts.shape == (len(rows), 10)
    assert bleu_of_counts(counts[chosen]) == pytest.approx(expected, rel=1e-12)


def test_rouge_l_of_english_is_that_of_rouge_score_with_the_best_reference() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    expected = [
        max(scorer.score(reference, reply)["rougeL"].fmeasure for reference in row)
        for reply, row in zip(REPLIES, REFERENCES, strict=True)
    ]
    assert rouge_l(REPLIES, REFERENCES) == pytest.approx(sum(expected) / 2)


def test_rouge_l_of_chinese_counts_characters() -> None:
    # Five of six characters in common order: precision = recall = F1 = 5/6.
    assert rouge_l([CHINESE], [[CHINESE_BUT_ONE]]) == pytest.approx(5 / 6)


def test_rouge_l_tells_words_apart_by_their_vowel_signs() -> None:
    boy, girl, good = (
        "\u0932\u0921\u093c\u0915\u093e",
        "\u0932\u0921\u093c\u0915\u0940",
        "\u0905\u091a\u094d\u091b\u093e",
    )
    assert rouge_l([boy], [[girl]]) == 0
    # One word of two in common: precision = recall = F1 = 1/2.
    assert rouge_l([f"{good} {boy}"], [[f"{good} {girl}"]]) == pytest.approx(1 / 2)


def test_rouge_l_takes_an_accent_in_either_of_its_forms() -> None:
    assert rouge_l(["re\u0301sume\u0301"], [["r\u00e9sum\u00e9"]]) == 1


def test_rouge_l_of_thai_counts_letters_with_their_signs() -> None:
    # Four letters, of which one has another vowel sign: precision = recall = F1 = 3/4.
    reply, reference = "\u0e14\u0e35\u0e21\u0e32\u0e01", "\u0e14\u0e39\u0e21\u0e32\u0e01"
    assert rouge_l([reply], [[reference]]) == pytest.approx(3 / 4)


def test_rouge_l_of_cyrillic_counts_words() -> None:
    reply = "\u0434\u043e\u0431\u0440\u043e\u0435 \u0443\u0442\u0440\u043e"
    assert rouge_l([reply], [[reply.upper()]]) == 1


@pytest.mark.parametrize(
    ("reply", "reference"),
    [
        ("Positive.", "positive"),
        ("  two\n words ", "Two words"),
        ("\uff30\uff4f\uff53", "pos"),  # full-width letters
        ("\u597d\u3002", "\u597d"),
        ("?", "?"),
    ],
)
def test_form_does_not_count_for_exact_match(reply: str, reference: str) -> None:
    assert exact_match([reply], [["something else", reference]]) == 1


@pytest.mark.parametrize(("reply", "reference"), [("-5", "5"), ("5 %", "5"), ("not good", "good")])
def test_content_counts_for_exact_match(reply: str, reference: str) -> None:
    assert exact_match([reply], [[reference]]) == 0


def test_exact_match_is_a_share_of_the_replies() -> None:
    assert exact_match(["a", "b", "c", "d"], [["a"], ["x"], ["C"], ["y"]]) == 0.5


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@pytest.mark.parametrize("metric", [bleu, rouge_l, exact_match])
@pytest.mark.parametrize(
    ("replies", "references", "message"),
    [
        ([], [], "no replies"),
        (["a"], [], "1 replies but 0 references"),
        (["a", "b"], [["a"], []], "prompt 1 has no reference"),
    ],
)
def test_nothing_to_compare_is_an_error(
    metric: object, replies: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        metric(replies, references)


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [
        (bleu, "sacrebleu", "sacrebleu"),
        (rouge_l, "rouge_score.rouge_scorer", "rouge-score"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(
    metric: object, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SetupError, match=rf"{package} .* pip install tunesmith\[metrics\]"):
        metric(REPLIES, REFERENCES)
