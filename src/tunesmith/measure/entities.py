"""F1 of whole entities from IOB2 tags (Tjong Kim Sang & De Meulder 2003; seqeval's definition).

An entity is right where its kind and both its ends are. Tags that IOB2 does not allow are read as
conlleval reads them: an `I-` that follows `O`, or another kind, begins an entity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Entity(NamedTuple):
    """Words [start, stop) of one kind."""

    kind: str
    start: int
    stop: int


class EntityCounts(NamedTuple):
    """What precision and recall are made of."""

    right: int
    """Entities in both."""
    predicted: int
    true: int

    @property
    def precision(self) -> float:
        """The share of predicted entities that are right; 0 where none is predicted."""
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """The share of true entities that are found; 0 where there is none."""
        return self.right / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of both; 0 where there is no entity."""
        both = self.predicted + self.true
        return 2 * self.right / both if both else 0.0


def marks_entities(labels: Sequence[str]) -> bool:
    """Return whether the labels are IOB2 tags: `O`, `B-KIND` and `I-KIND`, and some begin."""
    tags = [label for label in labels if label != "O"]
    return all(tag[:2] in {"B-", "I-"} and len(tag) > 2 for tag in tags) and any(
        tag.startswith("B-") for tag in tags
    )


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of one text, in their order."""
    found: list[Entity] = []
    start: int | None = None
    inside = ""
    for place, tag in enumerate([*tags, "O"]):
        kind = tag[2:]
        goes_on = tag.startswith("I-") and kind == inside and start is not None
        if goes_on:
            continue
        if start is not None:
            found.append(Entity(inside, start, place))
        start, inside = (None, "") if tag == "O" else (place, kind)
    return found


def count_entities(true: Sequence[str], predicted: Sequence[str]) -> EntityCounts:
    """Return how many entities of one text there are, are predicted, and are right."""
    theirs, ours = set(entities(true)), set(entities(predicted))
    return EntityCounts(len(theirs & ours), len(ours), len(theirs))


def total(counts: Sequence[EntityCounts]) -> EntityCounts:
    """Return the counts of several texts as one."""
    return EntityCounts(
        sum(c.right for c in counts), sum(c.predicted for c in counts), sum(c.true for c in counts)
    )
