"""MAM adapter: prefixes in attention, a parallel adapter beside the feed-forward (He et al. 2022).

arXiv:2110.04366, section 4.6: "mix-and-match".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import nn

from tunesmith.methods.adapter import Adapter
from tunesmith.methods.composed import ComposedAttachment, attach_parts
from tunesmith.methods.contract import Method
from tunesmith.methods.prefix_tuning import PrefixTuning

if TYPE_CHECKING:
    from tunesmith.models.sites import Sites


class MAM(Method):
    """Train a prefix and a scaled parallel adapter.

    Attention goes over [P; h], and the feed-forward gives FFN(h) + s W_up f(W_down h).

    Each of the two learns at its own method's rate: the prefix at ten times the adapter's.
    """

    default_learning_rate: ClassVar[float] = Adapter.default_learning_rate

    name: Literal["mam"] = "mam"
    """Prefixes in attention and parallel adapters beside the feed-forward."""
    prefix_length: int = Field(default=30, ge=1)
    """Prefix positions; 30 in the paper."""
    bottleneck: int | None = Field(default=None, ge=1)
    """Inner size of the adapter; 512 for the paper's width of 1024. None takes half of the
    width."""
    scale: float | Literal["learned"] = 4.0
    """s; 4 in the paper. learned is one parameter an adapter, 1 at the start."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> MamAttachment:
        """Hang a prefix under every attention layer and an adapter beside every feed-forward.

        Raises:
            MethodError: the attention cannot be extended, the prefix is longer than the context,
                or the name is taken.
        """
        methods = self.methods
        parts = attach_parts(model, sites, methods, name=name)
        return MamAttachment(methods, parts, default_learning_rate=self.default_learning_rate)

    @property
    def methods(self) -> dict[str, Method]:
        """What it is made of."""
        size = (
            {"reduction_factor": 2} if self.bottleneck is None else {"bottleneck": self.bottleneck}
        )
        return {
            "prefix": PrefixTuning(length=self.prefix_length),
            "adapter": Adapter(placement="parallel", scale=self.scale, **size),
        }


class MamAttachment(ComposedAttachment):
    """A prefix and adapters on one model."""

    title: ClassVar[str] = "mam"
