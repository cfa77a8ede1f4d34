"""What a run file says about rewards: a list of mappings, told apart by `kind`."""

from typing import Annotated

from pydantic import Field

from tunesmith.rewards.checks import Exact, Length, Number, Regex
from tunesmith.rewards.code import Code
from tunesmith.rewards.countdown import Countdown
from tunesmith.rewards.file import FileReward
from tunesmith.rewards.json_schema import JsonSchema
from tunesmith.rewards.run import RunReward

RewardSettings = Annotated[
    Exact | Number | Regex | Length | JsonSchema | Code | Countdown | FileReward | RunReward,
    Field(discriminator="kind"),
]
"""One reward; `weight` and `on_error` are the same for all kinds."""
