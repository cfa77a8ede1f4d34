"""What is optimised: one file an objective."""

from typing import Annotated

from pydantic import Field

from tunesmith.objectives.classification import Classification
from tunesmith.objectives.distillation import Distillation
from tunesmith.objectives.grpo import GRPO
from tunesmith.objectives.ppo import PPO
from tunesmith.objectives.preference import Preference
from tunesmith.objectives.reward import Reward
from tunesmith.objectives.sft import SFT
from tunesmith.objectives.token_classification import TokenClassification

# FromReplies (objectives/sampling.py) is what ppo and grpo have in common.
ObjectiveUnion = Annotated[
    SFT | Classification | TokenClassification | Reward | Preference | Distillation | PPO | GRPO,
    Field(discriminator="name"),
]

__all__ = [
    "GRPO",
    "PPO",
    "SFT",
    "Classification",
    "Distillation",
    "ObjectiveUnion",
    "Preference",
    "Reward",
    "TokenClassification",
]
