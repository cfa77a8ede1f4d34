"""What a plan counts on a model without weights is what training has."""

import torch

from numerics.matrix import base, cells, method_of, own
from tunesmith.methods.tuned import attach


@cells("planned")
def test_a_model_without_weights_has_the_same_trainables(family: str, method: str) -> None:
    real = attach(base(family), method_of(method))
    with torch.device("meta"):
        # Without data the grouped product of a mixture of experts takes bfloat16 only.
        empty = type(own(family))(own(family).config).eval().bfloat16()
    planned = attach(empty, method_of(method))
    assert planned.parameter_counts() == real.parameter_counts()
    shapes = {name: (p.shape, p.dtype) for name, p in real.trainable().items()}
    assert {name: (p.shape, p.dtype) for name, p in planned.trainable().items()} == shapes
    assert {p.device.type for p in planned.trainable().values()} == {"meta"}
