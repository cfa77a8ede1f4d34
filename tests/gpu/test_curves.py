"""The golden loss curves of a GPU: compiled blocks over bfloat16, fp8, nf4 and float32 weights."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

from curves import CONFIGURATIONS, curve, recorded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU = [name for name, its in CONFIGURATIONS.items() if its.device == "cuda"]


@pytest.mark.parametrize("name", ON_GPU)
def test_the_loss_curve_is_the_recorded_one(name: str) -> None:
    configuration = CONFIGURATIONS[name]
    if configuration.missing:
        pytest.skip(configuration.missing)
    expected = recorded(name)
    if expected is None:
        pytest.skip(f"{name} is not recorded; run tests/golden/make_curves.py --device cuda")
    torch._dynamo.reset()
    assert curve(configuration) == pytest.approx(expected, abs=configuration.tolerance)
