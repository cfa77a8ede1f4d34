"""What is optimised: one file an objective."""

from typing import Annotated

from pydantic import Field

from tunesmith.objectives.classification import Classification
from tunesmith.objectives.sft import SFT
from tunesmith.objectives.token_classification import TokenClassification

ObjectiveUnion = Annotated[SFT | Classification | TokenClassification, Field(discriminator="name")]

__all__ = ["SFT", "Classification", "ObjectiveUnion", "TokenClassification"]
