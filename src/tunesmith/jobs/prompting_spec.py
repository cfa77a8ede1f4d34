"""What a run says that asks a model as it is, perhaps with examples before each prompt."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from tunesmith.jobs.features_spec import file_without_steps
from tunesmith.settings import Settings
from tunesmith.spec import Run


class PromptingSettings(Settings):
    """How an untrained decoder is asked."""

    shots: int = Field(default=0, ge=0)
    """Examples of the training data in front of each prompt as earlier turns, chosen by the seed, a
    choice for all prompts; 0 asks without any."""


@dataclass(frozen=True)
class PromptingRun:
    """A run without training; of `run` only what it reads is meant."""

    run: Run
    """Model, objective, data, evaluation, engine and seed."""
    prompting: PromptingSettings

    def to_yaml(self) -> str:
        """Return the file that says exactly this."""
        return file_without_steps(self.run, "prompting", self.prompting)
