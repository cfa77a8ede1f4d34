"""What is trained: one file a method."""

from typing import Annotated

from pydantic import Field

from tunesmith.methods.full import Full
from tunesmith.methods.last_layer import LastLayer
from tunesmith.methods.lora import LoRA

MethodUnion = Annotated[LoRA | Full | LastLayer, Field(discriminator="name")]

__all__ = ["Full", "LastLayer", "LoRA", "MethodUnion"]
