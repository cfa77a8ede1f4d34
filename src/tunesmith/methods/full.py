"""Full fine-tuning: every parameter of the model trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from tunesmith.errors import MethodError
from tunesmith.methods.child import base_parameters, computed_parameters
from tunesmith.methods.contract import Method
from tunesmith.methods.selected import SelectedParameters

if TYPE_CHECKING:
    from tunesmith.models.sites import Sites


class Full(Method):
    """Train all parameters; matrix products run under autocast where weights are float32."""

    default_learning_rate: ClassVar[float] = 5e-5
    base_dtype: ClassVar[Literal["auto", "float32"]] = "float32"

    name: Literal["full"] = "full"
    """All parameters."""
    keep_base: bool = True
    """Keep the base's values on the CPU (memory: the model in its own dtype), so that the untuned
    model can be switched to. Without it that is refused, and detaching keeps the trained values."""
    weights: Literal["float32", "model"] = "float32"
    """What weights, gradients and AdamW's moments are kept in: float32, or the model's own dtype,
    which with `model.dtype: bfloat16` is half the memory and less time. bfloat16 then loses
    updates that are smaller than 1/256 of a weight, so small learning rates learn less."""

    def attach(
        self,
        model: nn.Module,
        sites: Sites,
        *,
        name: str = "default",
    ) -> SelectedParameters:
        """Select every parameter of the base but for those that are computed.

        Raises:
            MethodError: a parameter is quantised, or another method trains it; or `weights` keeps
                float16.
        """
        if self.weights == "model" and any(p.dtype == torch.float16 for p in model.parameters()):
            raise MethodError(
                "method.weights: model would keep AdamW's moments in float16, which has no number "
                "for the squares of small gradients; use weights: float32, or model.dtype: bfloat16"
            )
        return SelectedParameters(
            model,
            base_parameters(model).keys() - computed_parameters(model),
            keep_base=self.keep_base,
            in_float32=self.weights == "float32",
        )
