"""`engine.checkpointing: auto` at the start: the least recomputation that fits, by a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final, cast

import psutil
import torch

from tunesmith.data.pairs_collate import JudgedCollator
from tunesmith.engine.blocks import Level, Start, levels_of
from tunesmith.engine.compiled import compiles
from tunesmith.jobs.full_batch import sequences_a_row
from tunesmith.jobs.plan import plan
from tunesmith.jobs.planned_writing import sampling_of
from tunesmith.objectives import Distillation
from tunesmith.report.words import size

if TYPE_CHECKING:
    from tunesmith.data.pairs import PairCorpus
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.spec import Run

ROOM: Final = 0.95
"""Of the memory that is free: plans were up to 3 % too low, and allocators lose some."""
_COPIES: Final = 6
"""Of what goes into and out of every matrix, float32: more than any method here keeps."""
_LOGITS: Final = 2**31
"""Bytes that the loss takes at most besides, a chunk of logits at a time."""


def start_of(assembled: Assembled, peers: Peers) -> Start | None:
    """Return how much to recompute from the first step on, and why; None leaves that to trying.

    Where memory runs out all the same, more is recomputed then.
    """
    run, device = assembled.run, peers.device
    sharded = peers.size > 1 and run.engine.distribution == "fsdp"
    room = room_on(device)
    if run.engine.checkpointing != "auto" or sharded or room is None or not assembled.tuned.parts:
        return None
    length = longest(assembled)
    replies = most_replies(assembled)
    bound = _bound(assembled, replies * length)
    levels = levels_of(run.engine, compiled=compiles(run.engine, device, sharded=sharded))
    # A teacher stands beside what the bound knows of.
    if bound <= room and not isinstance(run.objective, Distillation):
        start = Start(levels[0], f"it needs less than {size(bound)}, and {size(room)} are free")
    else:
        try:
            peak_of = _planned(run, device, length, replies=replies, processes=peers.size)
            start = least(levels, peak_of, room)
        # A plan must not stop a run: memory then decides by running out.
        except Exception as error:  # noqa: BLE001
            start = Start(levels[0], f"nothing could be planned ({type(error).__name__}: {error})")
    # All do what the one with the least memory has to.
    return max(peers.gather(start), key=lambda each: levels.index(each.level))


def least(levels: Sequence[Level], peak_of: Callable[[str], int], room: int) -> Start:
    """Return the first of `levels` whose peak leaves some of `room`, or the last of all.

    Args:
        levels: from nothing recomputed on.
        peak_of: the planned bytes of a setting of `engine.checkpointing`.
        room: bytes that are free.
    """

    def peak(level: Level) -> int:
        whole = peak_of(level.mode or "none")
        if level.share == 1:
            return whole
        # Every block keeps alike, so a share of them saves that share.
        none = peak_of("none")
        return round(none + level.share * (whole - none))

    for level in levels:
        if peak(level) <= ROOM * room:
            break
    said = f"planned at {size(peak(level))} of {size(room)} that are free"
    if level != levels[0]:
        said += f", where none would take {size(peak_of('none'))}"
    return Start(level, said)


def longest(assembled: Assembled) -> int:
    """Return the tokens of the longest row of training, as far as they are known."""
    data, objective = assembled.run.data, assembled.run.objective
    bars = assembled.data.train_report.lengths
    if data.packing or not bars:
        return data.max_length
    # Of replies that are to be sampled the prompts alone are known.
    settings = sampling_of(objective)
    replies = 0 if settings is None else settings.max_new_tokens
    return min(data.max_length, max(bar.stop for bar in bars) + replies)


def most_replies(assembled: Assembled) -> int:
    """Return the most sequences that a row of training has: of judged replies there are several."""
    collate = assembled.collate
    if not isinstance(collate, JudgedCollator):
        return 1
    corpus = cast("PairCorpus", assembled.data.train.corpus)  # type: ignore[union-attr]
    return max(len(row.segments) for row in corpus.rows)


def _planned(
    run: Run, device: torch.device, length: int, *, replies: int, processes: int
) -> Callable[[str], int]:
    # A plan takes pairs; more replies to a prompt are as many as in more rows of pairs.
    rows = math.ceil(run.train.batch_size * replies / sequences_a_row(run))
    run = run.model_copy(update={"train": run.train.model_copy(update={"batch_size": rows})})

    @cache
    def peak_of(mode: str) -> int:
        engine = run.engine.model_copy(update={"checkpointing": mode})
        changed = run.model_copy(update={"engine": engine})
        # Whatever is recomputed, a roll-out takes the same.
        planned = plan(changed, device=device.type, length=length, processes=processes)
        return planned.alone.phases["training step"]

    return peak_of


def _bound(assembled: Assembled, length: int) -> int:
    """Return bytes that a step surely stays below; no plan is needed where these are there."""
    model, rows = assembled.tuned.model, assembled.run.train.batch_size
    config = model.config.get_text_config()
    matrices = [p for p in model.parameters() if p.dim() > 1 and max(p.shape) < config.vocab_size]
    widths = sum(sum(p.shape[-2:]) for p in matrices)
    heads = getattr(config, "num_attention_heads", 1) * len(assembled.tuned.sites.blocks)
    kept = rows * length * (widths * _COPIES + heads * length * 2) * 4
    state = 4 * sum(p.nbytes for p in assembled.tuned.trainable().values())
    return sum(p.nbytes for p in model.parameters()) + state + kept + _LOGITS


def room_on(device: torch.device) -> int | None:
    """Return the bytes that this process has on `device` or can still get; None if unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # torch.cuda.set_per_process_memory_fraction sets it; older versions do not tell.
        share_of = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        # By its index: this one takes no device without one, unlike all the others.
        limit = int(total * share_of(device.index)) if share_of else total
        return min(free + torch.cuda.memory_reserved(device), limit)
    if device.type == "cpu":
        return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
    return None
