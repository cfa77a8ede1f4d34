"""What methods tell of themselves after training, such as which one each layer chose."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from tunesmith.engine.evaluation import mean_loss
from tunesmith.objectives.sampling import FromReplies

if TYPE_CHECKING:
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.types import JSON

ROWS = 64
"""How many evaluation rows (or training rows, where there are none) the methods look at."""


def findings(assembled: Assembled, peers: Peers) -> dict[str, JSON]:
    """Return what the methods found out about themselves, by name; every process calls this alike.

    They look at rows one by one, so that no padding counts; each process has its own share of the
    rows.
    """
    looking = [a for a in assembled.tuned.attachments if a.observes]
    if looking and not isinstance(assembled.run.objective, FromReplies):  # no rows are given there
        with ExitStack() as stack:
            for attachment in looking:
                stack.enter_context(attachment.observing())
            mean_loss(
                assembled.program,
                assembled.data.evaluation[:ROWS] or assembled.data.train.peek(ROWS),
                assembled.collate,
                batch_size=1,
                peers=peers,
                autocast_dtype=assembled.autocast_dtype,
            )
    found: dict[str, JSON] = {}
    for attachment in assembled.tuned.attachments:
        found |= attachment.findings()
    return found
