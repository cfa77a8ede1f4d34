"""Entity F1 on cases worked by hand, among them those of seqeval's own documentation."""

import pytest

from tunesmith.measure.entities import (
    Entity,
    EntityCounts,
    count_entities,
    entities,
    marks_entities,
    total,
)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),  # two beside each other
        ("O I-PER I-PER O", [("PER", 1, 3)]),  # begins with I-
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),  # the kind changes
        ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("B-A-B I-A-B", [("A-B", 0, 2)]),  # a kind with a dash
        ("O O", []),
        ("", []),
    ],
)
def test_entities_are_read_off_the_tags(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == [Entity(*entity) for entity in expected]


def test_the_example_of_seqeval_has_f1_one_half() -> None:
    # The first text's entity has one true end only, the second text's is right: 1 of 2 and 1 of 2.
    true = ["O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    said = ["O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    counts = total([count_entities(t.split(), s.split()) for t, s in zip(true, said, strict=True)])
    assert counts == EntityCounts(right=1, predicted=2, true=2)
    assert (counts.precision, counts.recall, counts.f1) == (0.5, 0.5, 0.5)


def test_kind_and_both_ends_must_be_right() -> None:
    true = ["B-PER", "I-PER", "O", "B-LOC", "O", "B-ORG"]
    said = ["B-PER", "O", "O", "B-PER", "O", "B-ORG"]
    counts = count_entities(true, said)
    assert counts == EntityCounts(right=1, predicted=3, true=3)
    assert counts.f1 == pytest.approx(1 / 3)


def test_precision_and_recall_differ_where_more_is_said_than_is_there() -> None:
    counts = count_entities(["B-PER", "O", "O"], ["B-PER", "B-LOC", "I-LOC"])
    assert (counts.precision, counts.recall) == (0.5, 1.0)
    assert counts.f1 == pytest.approx(2 / 3)


def test_nothing_there_and_nothing_said_is_zero() -> None:
    counts = count_entities(["O"], ["O"])
    assert (counts.precision, counts.recall, counts.f1) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["B-PER", "I-PER", "O"], True),
        (["O", "B-X"], True),
        (["NOUN", "VERB"], False),
        (["O", "I-X"], False),  # nothing ever begins: not IOB2
        (["O", "B-X", "S-X"], False),
        (["O", "B-"], False),
    ],
)
def test_only_iob2_tags_mark_entities(labels: list[str], expected: bool) -> None:
    assert marks_entities(labels) is expected
