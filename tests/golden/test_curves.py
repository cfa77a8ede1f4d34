"""A change of numerics is seen at once: 50 steps of SmolLM2 lose what they lost when recorded.

`make_curves.py` records the curves anew. Those of a GPU are compared in tests/gpu/test_curves.py.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from curves import CONFIGURATIONS, STEPS, curve, recorded

ON_CPU = [name for name, its in CONFIGURATIONS.items() if its.device == "cpu"]


@pytest.mark.parametrize("name", ON_CPU)
def test_the_loss_curve_is_the_recorded_one(name: str) -> None:
    configuration = CONFIGURATIONS[name]
    if configuration.missing:
        pytest.skip(configuration.missing)
    expected = recorded(name)
    assert expected is not None
    assert len(expected) == STEPS
    assert expected[-1] < 0.5 * expected[0]
    assert curve(configuration) == pytest.approx(expected, abs=configuration.tolerance)
