"""Two methods on one model that would each have the same base parameter for itself."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import TYPE_CHECKING

from tunesmith.errors import MethodError
from tunesmith.methods.selected import SelectedParameters

if TYPE_CHECKING:
    from tunesmith.methods.contract import Attachment
    from tunesmith.methods.parts import Part
    from tunesmith.models.sites import Sites


def require_peace(parts: Iterable[Part], sites: Sites) -> None:
    """Check that no base parameter that one of `parts` trains itself is changed by another.

    Low-rank updates, factors and adapters compose at one site. But beside a weight that trains (or
    whose length DoRA learns) an update of it has nothing to add, and of two biases in place of the
    same one only one could be there.

    Raises:
        MethodError: two do; it names both and the place.
    """
    seen: list[Part] = []
    for part in parts:
        for other in seen:
            one, two = other.attachment, part.attachment
            shared = (one.trains_itself() & two.changes()) | (two.trains_itself() & one.changes())
            if shared:
                name = min(shared)
                raise MethodError(
                    f"method: {_called(other, part)} and {_called(part, other)} both train {name}"
                    f"{_site(name, sites)}, where only one of them can act; choose one, or give "
                    "them different targets"
                )
        seen.append(part)


def shared_values(one: Attachment, two: Attachment) -> frozenset[str]:
    """Return the base parameters that both put values of their own into."""
    if not (isinstance(one, SelectedParameters) and isinstance(two, SelectedParameters)):
        return frozenset()
    return one.trains_itself() & two.trains_itself()


def require_one_value(parts: Iterable[Part]) -> None:
    """Check that no two of `parts`, that are to act at once, put values into one base parameter.

    It has one value at a time: at the next switch those of one of the two would be lost.

    Raises:
        MethodError: two do; it names both.
    """
    for one, two in combinations(parts, 2):
        if shared := shared_values(one.attachment, two.attachment):
            raise MethodError(
                f"the adapters {one.name!r} and {two.name!r} both have values of their own for "
                f"{min(shared)}, where only one of them can act; switch the other off first, with "
                "use()"
            )


def _called(part: Part, other: Part) -> str:
    """Return the name of a method, and its adapter's where that is not the other's."""
    name: str = part.method.model_dump()["name"]
    return name if part.name == other.name else f"{name} ({part.name!r})"


def _site(name: str, sites: Sites) -> str:
    """Return the sites that the parameter `name` belongs to, in brackets."""
    module = name.rpartition(".")[0]
    found = [s.name for block in sites.blocks for s in block.sites if s.module == module]
    return f" ({', '.join(found)})" if found else ""
