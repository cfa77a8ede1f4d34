"""UniPELT: LoRA, prefix and adapter, each behind learned gates (Mao et al. 2022).

arXiv:2110.07577, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field
from torch import nn

from tunesmith.methods.adapter import Adapter
from tunesmith.methods.bottleneck import Bottleneck
from tunesmith.methods.child import ChildAttachment
from tunesmith.methods.composed import ComposedAttachment, attach_parts
from tunesmith.methods.contract import Method
from tunesmith.methods.gate import Gate
from tunesmith.methods.lora import LoRA
from tunesmith.methods.low_rank import LowRank
from tunesmith.methods.prefix import LayerInput, Prefix, join
from tunesmith.methods.prefix_tuning import PrefixTuning

if TYPE_CHECKING:
    from tunesmith.models.sites import Sites
    from tunesmith.types import JSON


class UniPELT(Method):
    """Train LoRA, a prefix and an adapter, and in each layer how much of each acts.

    q and v: W h + G_L s B A h; keys and values: [G_P P; h]; after the feed-forward:
    h_F + G_A W_up f(W_down h_F).
    """

    default_learning_rate: ClassVar[float] = Adapter.default_learning_rate

    name: Literal["unipelt"] = "unipelt"
    """LoRA, prefix and adapter with learned gates."""
    rank: int = Field(default=8, ge=1)
    """Rank of the LoRA; 8 in the paper."""
    alpha: float = Field(default=16, gt=0)
    """Strength of the LoRA, over its rank; 16 in the paper."""
    targets: list[str] = Field(default=["attention.q", "attention.v"], min_length=1)
    """Sites of the LoRA."""
    prefix_length: int = Field(default=10, ge=1)
    """Prefix positions; 10 in the paper."""
    bottleneck: int | None = Field(default=None, ge=1)
    """Inner size of the adapter; None takes a 16th of the width, the paper's 48 of 768."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> UniPeltAttachment:
        """Hang the three methods on the model, and a gate at each place where one of them acts.

        Raises:
            MethodError: the attention cannot be extended, a target is no site, a size does not
                fit, or the name is taken.
        """
        methods = self.methods
        parts = attach_parts(model, sites, methods, name=name)
        attachment = UniPeltAttachment(
            methods, parts, default_learning_rate=self.default_learning_rate
        )
        attachment.put_gates(model, sites, attribute=f"unipelt_{name}")
        return attachment

    @property
    def methods(self) -> dict[str, Method]:
        """What it is made of."""
        size = {} if self.bottleneck is None else {"bottleneck": self.bottleneck}
        return {
            "lora": LoRA(rank=self.rank, alpha=self.alpha, targets=self.targets),
            "prefix": PrefixTuning(length=self.prefix_length),
            "adapter": Adapter(placement="pfeiffer", **size),
        }


class UniPeltAttachment(ComposedAttachment):
    """Three methods and their gates on one model."""

    title: ClassVar[str] = "unipelt"
    observes: ClassVar[bool] = True

    def put_gates(self, model: nn.Module, sites: Sites, *, attribute: str) -> None:
        """Give every child that changes something a gate from what goes into it."""
        width = next(s.out_features for s in sites.blocks[0].sites if s.name == "attention.o")
        readers: dict[str, LayerInput] = {}
        self._gated: list[tuple[str, str, Gate]] = []
        """Part, block and gate."""
        self._means: dict[str, JSON] = {}
        for key, part in self.parts.items():
            for path, child in cast("ChildAttachment", part).children.items():
                if not isinstance(child, LowRank | Prefix | Bottleneck):
                    continue
                into = child.place.in_features if isinstance(child, LowRank) else width
                gate = Gate(into).to(next(child.parameters()).device)
                if isinstance(child, Prefix):
                    reader = readers[join(path.rpartition(".")[0], attribute)] = LayerInput()
                    child.gate_by(gate, reader)
                else:
                    child.token_gate = gate
                block = next(b.path for b in sites.blocks if path.startswith(f"{b.path}."))
                self._gated.append((key, block, gate))
        self.parts["inputs"] = ChildAttachment(model, readers)

    def learning_rate_scale(self, name: str) -> float:
        """Return what the learning rate of `name` is multiplied by; gates learn at the run's."""
        is_gate = name.endswith((".token_gate.w", ".token_gate.c"))
        return 1.0 if is_gate else super().learning_rate_scale(name)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Watch the gates inside a `with` block, for `findings`."""
        for _, _, gate in self._gated:
            gate.watch(True)
        try:
            yield
        finally:
            self._means = {block: {**means} for block, means in self.gates().items()}
            for _, _, gate in self._gated:
                gate.watch(False)

    def gates(self) -> dict[str, dict[str, float]]:
        """Return by block and method the mean gate over the tokens seen so far in `observing`."""
        found: dict[str, dict[str, list[float]]] = {}
        for key, block, gate in self._gated:
            if (mean := gate.mean()) is not None:
                found.setdefault(block, {}).setdefault(key, []).append(mean)
        return {
            block: {key: sum(means) / len(means) for key, means in by_method.items()}
            for block, by_method in found.items()
        }

    def findings(self) -> dict[str, JSON]:
        """Return which method each layer chose: `gates` at the end of the last `observing`."""
        return {"gates": self._means}
