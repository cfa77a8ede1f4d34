"""What the cells of the matrix share: which there are, models, inputs, and a method that acts.

A method joins by being in the union, an architecture by being in `FAMILIES`.
"""

from collections.abc import Callable, Collection
from copy import deepcopy
from functools import cache
from typing import Any, Final, get_args

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES, VOCAB
from numerics.reasons import ANY, REASONS, SETTINGS
from tunesmith.methods import MethodUnion
from tunesmith.methods.contract import Method
from tunesmith.methods.tuned import TunedModel, attach

METHODS: Final[dict[str, type[Method]]] = {
    method.model_fields["name"].default: method for method in get_args(get_args(MethodUnion)[0])
}
CELLS: Final = {
    "attach": "attaches",
    "start": "starts as the base, bitwise",
    "gradients": "trains its own parameters and nothing else",
    "off": "off and detached are the base, bitwise",
    "saved": "saved and loaded is the same, bitwise",
    "size": "the file holds only what was trained",
    "merge": "merged is unmerged",
    "checkpointing": "gradient checkpointing gives the same gradients",
    "padding": "padding changes nothing",
    "packing": "packing changes nothing",
    "generation": "cached generation is the full forward, step by step",
    "planned": "counts the same on a model without weights",
    "compiled": "a block compiles as one graph",
    "bfloat16": "trains on a bfloat16 base",
    "nf4": "trains on a 4-bit base as on the weights that its codes stand for",
    "int8": "trains on an 8-bit base as on the weights that its codes stand for",
}
"""Name of a cell, as reasons use it, and what holds in it."""

COMPILED: Final = [f for f in ("llama", "gpt2", "qwen3", "bert", "t5") if f in FAMILIES]
"""The architectures whose blocks are compiled: one of each way to build a block."""


def reason(method: str, cell: str, family: str) -> str | None:
    """Return why the cell is not what it is elsewhere; the most particular reason."""
    kind = FAMILIES[family].kind
    keys = [(m, cell, f) for m in (method, ANY) for f in (family, kind, ANY)]
    return next((REASONS[key] for key in keys if key in REASONS), None)


def cells(
    cell: str,
    *,
    where_refused: bool = False,
    families: Collection[str] = FAMILIES,
    sample: Collection[tuple[str, str]] | None = None,
) -> Callable[..., Any]:
    """Return a decorator that runs a test in this cell of every method and architecture.

    Args:
        cell: a key of `CELLS`.
        where_refused: also where there is a reason against it, which the test then looks at.
        families: the architectures that have it.
        sample: methods and architectures that every run of the suite tests; None is all of them.
    """

    def exists(method: str, family: str) -> bool:
        attaches = cell == "attach" or reason(method, "attach", family) is None
        return attaches and (where_refused or reason(method, cell, family) is None)

    def case(method: str, family: str) -> Any:
        rest = sample is not None and (method, family) not in sample
        marks = [pytest.mark.exhaustive] if rest else []
        return pytest.param(family, method, id=f"{method}-{family}", marks=marks)

    pairs = [case(m, f) for m in METHODS for f in families if exists(m, f)]

    def mark(test: Callable[..., None]) -> Any:
        return pytest.mark.cell(cell)(pytest.mark.parametrize(("family", "method"), pairs)(test))

    return mark


@cache
def own(family: str) -> PreTrainedModel:
    """The family's model, not to be changed."""
    torch.manual_seed(0)
    return FAMILIES[family].make()


def base(family: str) -> PreTrainedModel:
    """A fresh copy of the family's model; always the same weights."""
    return deepcopy(own(family))


def method_of(name: str) -> Method:
    return METHODS[name](**SETTINGS.get(name, {}))


def tuned_of(family: str, method: str) -> TunedModel:
    return attach(base(family), method_of(method))


def trained(tuned: TunedModel) -> TunedModel:
    """Give every trainable a random change, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(0.1 * noise)
    return tuned


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


IDS: Final = tokens(2, 6)
ROWS: Final = [tokens(length, seed=length) for length in (2, 7, 5)]


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def loss(family: str, tuned: TunedModel) -> Tensor:
    """The mean loss with the method's penalty; random gates draw the same each time."""
    torch.manual_seed(6)  # one that closes no gate of a whole tensor, which has no gradient then
    total = FAMILIES[family].loss(tuned.model, IDS)
    penalty = tuned.penalty()
    return total if penalty is None else total + penalty


def gradients(family: str, tuned: TunedModel) -> dict[str, Tensor | None]:
    tuned.model.zero_grad()
    loss(family, tuned).backward()
    return {name: p.grad for name, p in tuned.model.named_parameters()}
