"""How a quantity grows with length, from three measurements of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

STRAIGHT: Final = 0.02
"""A middle point nearer than this to the line through the other two lies on it."""


class Growth(NamedTuple):
    """y = constant + linear n + quadratic n^2."""

    constant: float
    linear: float
    quadratic: float

    def at(self, n: float) -> float:
        """Return y at `n`."""
        return self.constant + self.linear * n + self.quadratic * n * n


def growth_of(points: Sequence[tuple[float, float]]) -> Growth:
    """Return the line through the first and last of three points, or the parabola through all.

    The parabola is taken where the middle point lies off the line by more than 2 % of the last: a
    quadratic term from noise would be far wrong where it is read off, beyond the last point.

    Args:
        points: (n, y), three with n ascending.
    """
    (n0, y0), (n1, y1), (n2, y2) = points
    slope = (y2 - y0) / (n2 - n0)
    bend = y1 - (y0 + slope * (n1 - n0))
    if abs(bend) <= STRAIGHT * abs(y2):
        return Growth(y0 - slope * n0, slope, 0.0)
    # Newton's divided differences: y0 + slope01 (n - n0) + curve (n - n0) (n - n1).
    first = (y1 - y0) / (n1 - n0)
    curve = ((y2 - y1) / (n2 - n1) - first) / (n2 - n0)
    return Growth(y0 - first * n0 + curve * n0 * n1, first - curve * (n0 + n1), curve)
