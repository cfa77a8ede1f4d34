"""What is optimised: one file an objective."""

from typing import Annotated

from pydantic import Field

from tunesmith.objectives.sft import SFT

# A union of one is not a union to pydantic and takes no discriminator; with a second objective
# this becomes Annotated[SFT | Other, Field(discriminator="name")].
ObjectiveUnion = Annotated[SFT, Field()]

__all__ = ["SFT", "ObjectiveUnion"]
