"""A line where three points lie on one, else the parabola through them."""

import pytest

from tunesmith.measure.growth import growth_of


def test_three_points_on_a_line_give_it() -> None:
    growth = growth_of([(2, 7.0), (4, 11.0), (8, 19.0)])
    assert growth == pytest.approx((3.0, 2.0, 0.0))
    assert growth.at(100) == pytest.approx(203.0)


def test_three_points_of_a_parabola_give_it() -> None:
    def y(n: float) -> float:
        return 5 + 3 * n + 2 * n * n

    growth = growth_of([(n, y(n)) for n in (16, 32, 64)])
    assert growth == pytest.approx((5, 3, 2))
    assert growth.at(512) == pytest.approx(y(512))


def test_a_middle_that_is_off_by_noise_bends_nothing() -> None:
    assert growth_of([(1, 100.0), (2, 203.0), (4, 400.0)]).quadratic == 0.0
