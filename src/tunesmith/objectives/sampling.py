"""How replies are sampled to learn from, and what they are worth: shared by ppo and grpo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.objectives.contract import Objective
from tunesmith.objectives.sft import SFT
from tunesmith.rewards.settings import RewardSettings
from tunesmith.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.types import Batch, LossTerms


class Sampling(Settings):
    """How replies are sampled."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Longest reply."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; 1 is the policy itself, which the importance ratios are of."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the most likely tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample among so many most likely tokens; 0 is all."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a reply, beside the end of the turn."""
    batch_size: int = Field(default=64, ge=1)
    """Replies a process writes at once."""
    decoding: Literal["auto", "growing", "fixed", "vllm"] = "auto"
    """The cache: growing, or fixed with the step as one CUDA graph; auto is fixed on CUDA where the
    model allows it. With vllm another engine writes, for lora on a base that is not quantised."""


class Rollout(Sampling):
    """How replies are sampled, and to what."""

    replies: int = Field(default=64, ge=1)
    """Replies sampled at a time, over all processes, before learning from them: a multiple of the
    rows of an optimiser step."""
    prompt_tokens: int | None = Field(default=None, ge=1)
    """Ask with the first so many tokens of each prompt only: the model goes on with a text that is
    cut, which needs model.chat_template: text."""


class FromReplies(Objective):
    """An objective that learns from the model's own replies."""

    name: str
    rewards: list[RewardSettings] = Field(min_length=1)
    """What replies are worth: the weighted sum of these."""
    rollout: Rollout = Rollout()
    """How replies are sampled."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the replies before new ones are sampled."""
    missing_end_penalty: float = Field(default=0.0, ge=0)
    """Taken off the score of a reply that did not end by itself (the missing-EOS penalty of Huang
    et al. 2024, arXiv:2403.17031, detail 3)."""
    kl_stop: float | None = Field(default=None, gt=0)
    """Sample anew as soon as the policy is this far, in nats a token, from the one that wrote the
    rows to come; none takes all epochs."""
    pretraining_weight: float = Field(default=0.03, gt=0)
    """What a nat a token on the texts of data.pretraining costs beside the loss of the replies
    (gamma of Ouyang et al. 2022, arXiv:2203.02155, eq. 2: PPO-ptx); without such texts, nothing."""
    pretraining_rows: int = Field(default=16, ge=1)
    """Of these texts in an optimiser step, over all processes."""

    def prepared(self, batch: Batch) -> Batch:
        """Return `batch` with where its texts are supervised: finding it waits for a GPU."""
        if "texts" not in batch:
            return batch
        return batch | {"texts": SFT().prepared(batch["texts"])}

    def with_texts(self, model: PreTrainedModel, batch: Batch, terms: LossTerms) -> LossTerms:
        """Return the loss of replies with that of the texts in the same batch.

            loss + gamma E[-log p(x)],  x a text: eq. 2 of Ouyang et al. 2022, with its sign turned.

        Both are means over an optimiser step: of the replies over what `count` says, of the texts
        over their tokens, which `text_scale` carries from the one divisor to the other.
        """
        if "text_scale" not in batch:
            return terms
        nats = terms.total.new_zeros(())
        if "texts" in batch:
            nats = SFT().loss(model, batch["texts"]).total * batch["text_scale"]
        metrics = terms.metrics | {"pretraining_loss": nats.detach()}
        return terms._replace(total=terms.total + self.pretraining_weight * nats, metrics=metrics)
