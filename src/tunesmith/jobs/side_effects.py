"""What a run costs besides training: general language forgotten, time added to every forward."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from tunesmith.data.collate_replies import ReplyCollator
from tunesmith.data.collate_taught import TaughtCollator
from tunesmith.data.pairs_collate import JudgedCollator
from tunesmith.data.rows import TokenRow
from tunesmith.engine.evaluation import mean_loss, measuring
from tunesmith.errors import SpecError
from tunesmith.jobs.assemble import Program
from tunesmith.jobs.examine import chosen
from tunesmith.models.modes import autocasting
from tunesmith.objectives import SFT

if TYPE_CHECKING:
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.types import JSON, Collate

MOST_TOKENS: Final = 4096
"""Of the general text."""
_ROUNDS: Final = 3
_BATCHES: Final = 2


def general_loss_of_base(assembled: Assembled, peers: Peers) -> float | None:
    """Return the loss of the base model on general text; None where it was not asked for.

    Raises:
        SpecError: the text cannot be read, or the run's objective is no language model's.
    """
    off = nullcontext() if assembled.tuned.identity_at_start else assembled.tuned.disabled()
    with off:
        return general_loss(assembled, peers)


def side_effects(assembled: Assembled, peers: Peers, before: float | None) -> dict[str, JSON]:
    """Return what summary.json says of them; empty where nothing was asked for.

    Args:
        assembled: the run, trained.
        peers: every process calls this alike.
        before: what `general_loss_of_base` gave before training.
    """
    found: dict[str, JSON] = {}
    if (after := general_loss(assembled, peers)) is not None:
        found["general_loss"] = {"before": before, "after": after}
    if (slowdown := inference_slowdown(assembled, peers)) is not None:
        found["inference_slowdown"] = slowdown
    return found


def general_loss(assembled: Assembled, peers: Peers) -> float | None:
    """Return the loss on general text in nats a token, as the model is now; None where not asked.

    The rise of it is what a run forgets (McCloskey & Cohen 1989). Every process calls this alike.

    Raises:
        SpecError: the text cannot be read, or the run's objective is no language model's.
    """
    name = assembled.run.evaluation.general
    if name is None:
        return None
    if assembled.run.objective.head != "causal_lm":
        raise SpecError(
            "evaluation.general: the loss on general text needs a language model's head, which "
            f"the objective {assembled.run.objective.name} has not; leave it out"
        )
    if assembled.tuned.model.config.is_encoder_decoder:
        raise SpecError(
            "evaluation.general: the loss on general text is that of going on with it, and "
            f"{assembled.run.model.name} reads and writes apart; leave it out"
        )
    own = assembled.collate
    more = JudgedCollator | ReplyCollator | TaughtCollator
    collate: Collate[TokenRow] = own.plain if isinstance(own, more) else own
    # Whatever a run learns by: other objectives have no loss of a plain text, or another one.
    metrics = mean_loss(
        Program(assembled.tuned.model, SFT()),
        _rows(assembled, name),
        collate,
        batch_size=assembled.run.evaluation.batch_size,
        peers=peers,
        autocast_dtype=assembled.autocast_dtype,
    )
    return metrics["loss"]


def _rows(assembled: Assembled, name: str) -> list[TokenRow]:
    """Return the text cut into rows that are all supervised."""
    ids = assembled.tokenizer(_text(name), add_special_tokens=False, verbose=False).input_ids
    length = min(assembled.run.data.max_length, 512)
    return [
        TokenRow(np.asarray(part, np.int32), np.ones(len(part), np.bool_), (len(part),))
        for start in range(0, min(len(ids), MOST_TOKENS), length)
        if len(part := ids[start : start + length]) > 1
    ]


def _text(name: str) -> str:
    if name == "bundled":
        return (resources.files("tunesmith.jobs") / "general.txt").read_text(encoding="utf-8")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"evaluation.general: {name} cannot be read ({error})") from error


def inference_slowdown(assembled: Assembled, peers: Peers) -> float | None:
    """Return the time of a forward pass with the methods on, over that with them off.

    Each is the least of several rounds over the same batches, on and off in turn, so that what
    else the machine does weighs on both alike. None where it was not asked for, or where base
    weights themselves trained, which costs no time.
    """
    settings = assembled.run.evaluation
    if not settings.inference or not assembled.data.evaluation or assembled.tuned.trains_base:
        return None
    rows = list(chosen(assembled.data.evaluation, settings)[: _BATCHES * settings.batch_size])
    batches = [
        peers.to_device(assembled.collate(rows[start : start + settings.batch_size]))
        for start in range(0, len(rows), settings.batch_size)
    ]
    on = off = math.inf
    with measuring(assembled.program):
        for _ in range(_ROUNDS):
            on = min(on, _seconds(assembled, batches, peers.device))
            with assembled.tuned.disabled():
                off = min(off, _seconds(assembled, batches, peers.device))
    return on / off


def _seconds(assembled: Assembled, batches: list[dict[str, object]], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    with autocasting(device, assembled.autocast_dtype):
        for batch in batches:
            assembled.program(batch)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
