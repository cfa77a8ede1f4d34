"""Checks of a classifier: its labels, its head, its saved tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from tunesmith.models.heads import head_kind, head_logits
from tunesmith.models.modes import evaluating
from tunesmith.types import Proof

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.data.rows import TokenRow
    from tunesmith.jobs.assemble import Assembled

PROBE = "Is 12 more than 7?\n\n\u4f60\u597d"
TOLERANCE = 2e-2
"""Of the largest logit: wide enough for bfloat16, far too narrow for another token's logits."""


def labels_recorded(assembled: Assembled) -> Proof:
    """The model's config names the outputs as the training data are numbered."""
    model, objective = assembled.tuned.model, assembled.run.objective
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    labels: list[str] | None = getattr(objective, "labels", None)
    counts = assembled.data.train_report.classes
    detail = ", ".join(f"{label} {count:,}" for label, count in counts[:12]) or "a number"
    equal = labels is None or names == labels
    return Proof("labels recorded in the model", equal, detail)


def every_row_labelled(rows: Sequence[TokenRow]) -> Proof:
    """Of labelled words, every row has one that survived the cut."""
    bare = sum(not row.supervised.any() for row in rows)
    detail = f"{len(rows) - bare} of {len(rows)} rows have labelled words"
    return Proof("words labelled", bare == 0, detail)


@torch.no_grad()
def head_reads_its_text(model: PreTrainedModel) -> Proof:
    """A text without padding gives the logits that the model's own forward gives."""
    pad = model.config.pad_token_id
    some = [token for token in range(4) if token != pad][:3]
    ids = torch.tensor([some], device=model.device)
    with evaluating(model):
        expected = model(input_ids=ids).logits.float()
        ours = head_logits(model, {"input_ids": ids})
    largest = expected.abs().max().clamp(min=1e-6)
    difference = float((ours - expected).abs().max() / largest)
    detail = f"{head_kind(model)}: they differ by {difference:.1e} of the largest"
    return Proof("loss sees the model's own logits", difference <= TOLERANCE, detail)


def same_tokens(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Proof:
    """The saved tokenizer makes the tokens that were trained on."""
    saved = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    here, there = (one(PROBE)["input_ids"] for one in (tokenizer, saved))
    return Proof("saved tokenizer is the trained one", here == there, f"{len(here)} tokens")
