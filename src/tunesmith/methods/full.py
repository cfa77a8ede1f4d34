"""Full fine-tuning: every parameter of the model trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from tunesmith.methods.child import base_parameters
from tunesmith.methods.contract import Method
from tunesmith.methods.selected import SelectedParameters

if TYPE_CHECKING:
    from tunesmith.models.sites import Sites


class Full(Method):
    """Train all parameters, in float32; matrix products run under autocast."""

    default_learning_rate: ClassVar[float] = 5e-5
    base_dtype: ClassVar[Literal["auto", "float32"]] = "float32"

    name: Literal["full"] = "full"
    """All parameters."""
    keep_base: bool = True
    """Keep the base's values on the CPU (memory: the model in its own dtype), so that the untuned
    model can be switched to. Without it that is refused, and detaching keeps the trained values."""

    def attach(
        self,
        model: nn.Module,
        sites: Sites,
        *,
        name: str = "default",
    ) -> SelectedParameters:
        """Select every parameter of the base.

        Raises:
            MethodError: a parameter is quantised, or another method trains it.
        """
        return SelectedParameters(model, base_parameters(model), keep_base=self.keep_base)
