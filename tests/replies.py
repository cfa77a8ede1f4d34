"""Batches of replies for the objectives that learn from them."""

from typing import Any

import torch
from transformers import PreTrainedModel

PROMPTS, LENGTHS = (3, 2, 4), (4, 1, 3)
"""Tokens of each prompt and each reply: unequal, or the tests prove little."""


def reply_batch(**values: torch.Tensor) -> dict[str, Any]:
    """Three replies, padded on the right, with `values` (tokens,) a token."""
    length = max(p + n for p, n in zip(PROMPTS, LENGTHS, strict=True))
    ids = torch.full((3, length), 2)
    labels, mask = torch.full((3, length), -100), torch.zeros(3, length, dtype=torch.int64)
    for row, (prompt, reply) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        ids[row, : prompt + reply] = torch.randint(3, 300, (prompt + reply,))
        labels[row, prompt : prompt + reply] = ids[row, prompt : prompt + reply]
        mask[row, : prompt + reply] = 1
    owners = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "reply": owners,
        "replies": 3,
        **values,
    }


def plain_log_probs(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Log-probabilities and entropies of the replies' tokens out of the whole logits, (tokens,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    all_of = logits[:, :-1].log_softmax(-1)
    chosen = batch["labels"][:, 1:] != -100
    tokens = batch["input_ids"][:, 1:][chosen]
    picked = all_of[chosen]
    entropy = -(picked.exp() * picked).sum(-1)
    return picked.gather(-1, tokens[:, None])[:, 0], entropy
