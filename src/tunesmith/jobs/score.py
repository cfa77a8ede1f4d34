"""What the reward model of a finished run gives to replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from tunesmith.data.conversation import Conversation
from tunesmith.data.formats import renamed
from tunesmith.data.pairs_collate import JudgedCollator
from tunesmith.data.pairs_rows import dialogue, replies_of
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RawRow, TokenRow
from tunesmith.data.settings import Source
from tunesmith.data.sources import locate, read
from tunesmith.engine.evaluation import measuring
from tunesmith.errors import DataError
from tunesmith.jobs.assemble import choose_padding
from tunesmith.models.modes import autocasting

if TYPE_CHECKING:
    from tunesmith.jobs.result import LoadedRun
    from tunesmith.objectives import Reward


def conversation_of(text: str) -> Conversation:
    r"""Return a text as a conversation that ends in a reply.

    `Human: ...\n\nAssistant: ...` is read as such; any other text is a reply to nothing.
    """
    whole = dialogue(text if text.startswith("\n\n") else f"\n\n{text}")
    if whole and whole[-1]["role"] == "assistant":
        return Conversation(tuple(whole))
    return Conversation(({"role": "assistant", "content": text},))


def conversations_in(path: str | Path, run_source: Source) -> list[Conversation]:
    """Return the replies of a file, each with its prompt: all of a row that holds several.

    Raises:
        DataError: the file cannot be read, or a row has no reply.
    """
    found: list[Conversation] = []
    for row in read(locate(Source(path=str(path)))):
        if not isinstance(row, RawRow):
            raise DataError(row.message)
        columns = {ours: own for ours, own in run_source.columns.items() if own in row.values}
        values = renamed(row.values, columns)
        try:
            text = values.get("text")
            own = (
                [conversation_of(text)] if isinstance(text, str) else replies_of(values, run_source)
            )
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error
        found += own
    return found


def score(loaded: LoadedRun, conversations: Sequence[Conversation]) -> list[float]:
    """Return the reward of each conversation's last reply, in their order.

    Raises:
        DataError: a conversation has no reply, or the template cannot render it.
    """
    objective, run = cast("Reward", loaded.run.objective), loaded.run
    renderer = Renderer(loaded.tokenizer)
    rows = [judged_row(renderer, one, run.data.max_length) for one in conversations]
    model, device = loaded.tuned.model, loaded.peers.device
    collate = JudgedCollator(cast("int", loaded.tokenizer.pad_token_id), choose_padding(run, model))
    size, dtype, found = run.evaluation.batch_size, loaded.autocast_dtype, list[float]()
    for start in range(0, len(rows), size):
        batch = loaded.peers.to_device(collate.plain(rows[start : start + size]))
        with measuring(model), autocasting(device, dtype):
            found += objective.rewards(model, batch).float().tolist()
    return found


def judged_row(renderer: Renderer, sample: Conversation, max_length: int) -> TokenRow:
    """Return a conversation as a reward model reads it: up to its last reply's end-of-turn.

    A reward is read at the last token, and what a template writes behind the turn is left off in
    training too.

    Raises:
        DataError: it has no reply, or the template cannot render it.
    """
    row = renderer.row(sample)
    said = np.flatnonzero(row.supervised)
    if len(said) == 0:  # an empty reply, whose turn is closed as that of any other
        *before, last = sample.messages
        other = renderer.row(replace(sample, messages=(*before, last | {"content": "a"})))
        behind = len(other.input_ids) - 1 - int(np.flatnonzero(other.supervised)[-1])
    else:
        behind = len(row.input_ids) - 1 - int(said[-1])
    stop = min(len(row.input_ids) - behind, max_length)
    return TokenRow(row.input_ids[:stop], row.supervised[:stop], (stop,))
