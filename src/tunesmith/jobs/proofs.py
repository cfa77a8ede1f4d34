"""Checks against silently wrong runs: before the first step, after each save, after a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tunesmith.engine.evaluation import measuring
from tunesmith.errors import ProofError
from tunesmith.jobs.labelled import classifies, compares, has_head
from tunesmith.jobs.proofs_labels import (
    every_row_labelled,
    head_reads_its_text,
    labels_recorded,
    same_tokens,
)
from tunesmith.jobs.proofs_pairs import (
    is_exact,
    replies_apart,
    start_tolerance,
    starts_at_reference,
)
from tunesmith.jobs.proofs_replies import policy_starts_at_reference, sampling_agrees
from tunesmith.measure.parity import logit_parity
from tunesmith.methods.adapter_files import places_of_adapters
from tunesmith.models.modes import autocasting
from tunesmith.models.output_head import check_output_head
from tunesmith.models.quiet import without_progress_bars
from tunesmith.objectives.sampling import FromReplies
from tunesmith.types import Proof

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tunesmith.data.rows import TokenRow
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.jobs.run_directory import RunDirectory
    from tunesmith.methods.tuned import TunedModel

ROWS = 8
"""Rows that the proofs before the first step look at."""


def prove_start(assembled: Assembled, peers: Peers) -> list[Proof]:
    """Return what holds before the first step.

    Raises:
        ProofError: something does not hold; its message says what to do.
    """
    if isinstance(assembled.run.objective, FromReplies):
        return require(
            [
                trains(assembled.tuned),
                head_understood(assembled),
                policy_starts_at_reference(assembled, peers),
                sampling_agrees(assembled, peers),
            ]
        )
    rows = assembled.data.train.peek(ROWS)
    own = _of_labels if classifies(assembled.run) else _of_turns
    judged = compares(assembled.run)
    return require(
        [
            trains(assembled.tuned),
            *own(assembled, rows),
            starts_at_base(assembled, rows[:2], peers),
            *(starts_at_reference(assembled, rows, peers) if judged else []),
            (replies_apart if judged else no_contamination)(assembled, rows[:3], peers),
        ]
    )


def _of_turns(assembled: Assembled, rows: Sequence[TokenRow]) -> list[Proof]:
    """Return what holds of rows with replies, and of the head."""
    new_head = has_head(assembled.run)
    return [
        supervision(assembled, rows),
        end_of_turn(assembled, rows),
        head_reads_its_text(assembled.tuned.model) if new_head else head_understood(assembled),
    ]


def _of_labels(assembled: Assembled, rows: Sequence[TokenRow]) -> list[Proof]:
    """Return what holds of a classifier's rows and head."""
    words = assembled.run.objective.head == "token_classification"
    return [
        labels_recorded(assembled),
        *([every_row_labelled(rows)] if words else []),
        head_reads_its_text(assembled.tuned.model),
    ]


def prove_saved(assembled: Assembled, directory: RunDirectory) -> list[Proof]:
    """Return what holds after saving.

    Raises:
        ProofError: what was written is not what was trained.
    """
    same = same_tokens if classifies(assembled.run) else same_template
    if directory.model.exists():
        weights = whole_model_reads_back(assembled.tuned, directory.model)
        return require([weights, same(assembled.tokenizer, directory.model)])
    weights = reads_back(assembled.tuned, directory.adapter)
    return require([weights, same(assembled.tokenizer, directory.adapter)])


def told(proof: Proof) -> str:
    """Return a proof as a line."""
    return f"{'ok' if proof.passed else 'FAILED'}  {proof.name}: {proof.detail}"


def require(proofs: Sequence[Proof]) -> list[Proof]:
    """Return `proofs` if all of them hold.

    Raises:
        ProofError: naming each that does not.
    """
    failed = [f"{proof.name}: {proof.detail}" for proof in proofs if not proof.passed]
    if failed:
        raise ProofError("; ".join(failed))
    return list(proofs)


def trains(tuned: TunedModel) -> Proof:
    """Something trains, and exactly what the method says."""
    counts = tuned.parameter_counts()
    wanted = {name for name, p in tuned.model.named_parameters() if p.requires_grad}
    share = counts.trainable / max(counts.base, 1)
    largest = sorted(counts.by_kind.items(), key=lambda item: -item[1])[:3]
    kinds = ", ".join(f"{name} {number:,}" for name, number in largest)
    return Proof(
        "parameters that train",
        bool(counts.trainable) and wanted == set(tuned.trainable()),
        f"{counts.trainable:,} ({share:.2%} of the base model's {counts.base:,}): {kinds}"
        + (", ..." if len(counts.by_kind) > len(largest) else ""),
    )


def supervision(assembled: Assembled, rows: Sequence[TokenRow]) -> Proof:
    """Every row has a supervised token."""
    tokens = sum(len(row.input_ids) for row in rows)
    supervised = sum(int(row.supervised.sum()) for row in rows)
    bare = sum(not row.supervised.any() for row in rows)
    report = assembled.data.train_report
    seen = f"{supervised:,} of {tokens:,} tokens in {len(rows)} rows ({supervised / tokens:.1%})"
    if report.tokens:
        share = report.supervised_tokens / report.tokens
        seen = f"{report.supervised_tokens:,} of {report.tokens:,} tokens ({share:.1%})"
    detail = seen if not bare else f"{bare} of {len(rows)} rows have none; check data.supervise"
    return Proof("tokens supervised", bare == 0, detail)


def end_of_turn(assembled: Assembled, rows: Sequence[TokenRow]) -> Proof:
    """The token that ends the assistant's turn is learned, or replies would never stop."""
    ends = set(assembled.facts.end_of_turn_ids)
    missing = sum(not ends & set(row.input_ids[row.supervised].tolist()) for row in rows)
    report = assembled.data.train_report
    cut = report.truncated + report.unfinished > 0
    names = ", ".join(repr(assembled.tokenizer.decode([token])) for token in sorted(ends))
    detail = f"{names} is supervised in {len(rows) - missing} of {len(rows)} rows"
    if missing:
        detail += "; the rest are cut" if cut else "; check model.chat_template"
    return Proof("end of turn supervised", missing == 0 or cut, detail)


def head_understood(assembled: Assembled) -> Proof:
    """The loss sees the logits that the model itself would give."""
    difference = check_output_head(assembled.tuned.model)
    return Proof(
        "loss sees the model's own logits", True, f"they differ by {difference:.1e} of the largest"
    )


def starts_at_base(assembled: Assembled, rows: Sequence[TokenRow], peers: Peers) -> Proof:
    """A method that promises identity at the start gives the base model's loss."""
    if not all(part.attachment.identity_at_start for part in assembled.tuned.parts):
        return Proof("starts at the base", True, "not promised by this method")
    if not assembled.tuned.keeps_base:
        return Proof("starts at the base", True, "not looked at, with method.keep_base: false")
    on = _loss(assembled, rows, peers)
    with assembled.tuned.disabled():
        off = _loss(assembled, rows, peers)
    close = abs(on - off) <= start_tolerance(assembled) * max(1.0, abs(off))
    return Proof("starts at the base", close, f"loss {on:.6f}, base model {off:.6f}")


def no_contamination(assembled: Assembled, rows: Sequence[TokenRow], peers: Peers) -> Proof:
    """Rows side by side in one batch give the loss they give apart."""
    together = _loss(assembled, rows, peers)
    apart = sum(_loss(assembled, [row], peers) for row in rows)
    allowed = 1e-4 if is_exact(assembled) else 2e-2
    close = abs(together - apart) <= allowed * max(1.0, abs(apart))
    kind = "side by side without padding" if assembled.padding_free else "padded"
    return Proof("rows do not see each other", close, f"{together:.4f} {kind}, {apart:.4f} apart")


def _loss(assembled: Assembled, rows: Sequence[TokenRow], peers: Peers) -> float:
    batch = peers.to_device(assembled.collate(list(rows)))
    with measuring(assembled.program), autocasting(peers.device, assembled.autocast_dtype):
        return float(assembled.program(batch).total)


def reads_back(tuned: TunedModel, directory: Path) -> Proof:
    """The saved adapter holds, bit for bit, what was trained."""
    adapters = tuned.files()
    equal, tensors = True, 0
    for place, adapter in places_of_adapters(directory, adapters):
        equal &= _same_tensors(load_file(place / "adapter_model.safetensors"), adapter.tensors)
        tensors += len(adapter.tensors)
    return Proof("saved file reads back equal", equal, f"{tensors} tensors in {directory}")


def whole_model_reads_back(tuned: TunedModel, directory: Path) -> Proof:
    """The saved model holds, bit for bit, the trained weights in their saved dtype."""
    # Loaded and not only read: files name the experts of a mixture otherwise than the model does.
    with without_progress_bars():
        model = type(tuned.model).from_pretrained(directory, dtype="auto", local_files_only=True)
    saved = model.state_dict()
    trained = {name: p.detach() for name, p in tuned.trainable().items()}
    equal = all(torch.equal(saved[n], p.cpu().to(saved[n].dtype)) for n, p in trained.items())
    return Proof("saved model reads back equal", equal, f"{len(trained)} tensors in {directory}")


def _same_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name].cpu()) for name, tensor in one.items()
    )


def same_template(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Proof:
    """The saved tokenizer renders a conversation into the tokens that were trained on."""
    messages = [
        {"role": "user", "content": "Is 12 more than 7?\n\n\u4f60\u597d"},
        {"role": "assistant", "content": "Yes."},
    ]
    saved = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    here, there = (
        one.apply_chat_template(messages, tokenize=True, return_dict=False)
        for one in (tokenizer, saved)
    )
    return Proof("saved chat template is the trained one", here == there, f"{len(here)} tokens")


def merged_agrees(tuned: TunedModel, ids: torch.Tensor, *, tolerance: float) -> Proof:
    """The logits with the method merged are those with the method beside the weights.

    Args:
        tuned: unmerged; is unmerged again afterwards.
        ids: (batch, length) int64 tokens to compare on.
        tolerance: largest absolute difference allowed, relative to the largest logit.
    """
    parity = logit_parity(tuned.model, ids, nullcontext(), tuned.merged())
    detail = (
        f"largest difference of logits {parity.difference:.2e} where the largest logit is "
        f"{parity.largest:.1f} (allowed: {tolerance:g} of it)"
    )
    return Proof("merged equals unmerged", parity.within(tolerance), detail)
