"""Two methods on one model that would each have the same base parameter for itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tunesmith.errors import MethodError

if TYPE_CHECKING:
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


def _called(part: Part, other: Part) -> str:
    """Return the name of a method, and its adapter's where that is not the other's."""
    name: str = part.method.model_dump()["name"]
    return name if part.name == other.name else f"{name} ({part.name!r})"


def _site(name: str, sites: Sites) -> str:
    """Return the sites that the parameter `name` belongs to, in brackets."""
    module = name.rpartition(".")[0]
    found = [s.name for block in sites.blocks for s in block.sites if s.module == module]
    return f" ({', '.join(found)})" if found else ""
