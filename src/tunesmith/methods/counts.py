"""How many parameters there are, and of which kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tunesmith.models.quantize import numel


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters there are, tied ones counted once."""

    trainable: int
    base: int
    """Parameters of the base model, trained or not."""
    by_kind: dict[str, int]
    """Trainable ones by name, with the number of the block left out."""


def count_parameters(
    trainable: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> ParameterCounts:
    """Count both, and what trains by its name without the block's number."""
    by_kind: Counter[str] = Counter()
    for name, parameter in trainable.items():
        by_kind[re.sub(r"\.\d+(?=\.)", ".*", name)] += parameter.numel()
    return ParameterCounts(by_kind.total(), sum(map(numel, base.values())), dict(by_kind))
