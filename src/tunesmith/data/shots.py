"""Few-shot prompts: examples of the training data as earlier turns (Brown et al. 2020, sec. 2).

arXiv:2005.14165. Nothing trains; the examples stand before what is asked, as if the conversation
had begun with them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from tunesmith.data.conversation import Conversation
from tunesmith.data.formats import layout_of
from tunesmith.data.rows import Prompt, RawRow, TokenRow, Values
from tunesmith.data.sources import locate, read
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tunesmith.data.render import Renderer
    from tunesmith.data.settings import DataSettings, Source

MOST_ROWS: Final = 20_000
"""Of each training source, from the first on, among which examples are chosen."""


def choose_examples(
    settings: DataSettings, asked: Sequence[Prompt | None], *, count: int, seed: int
) -> list[Conversation]:
    """Return training samples without their system turns, each ending with its reply.

    Args:
        settings: whose training sources are read.
        asked: what the evaluation asks; no example asks the same.
        count: how many.
        seed: of the choice.

    Raises:
        DataError: there are fewer.
    """
    taken = {_whole(prompt.messages, "").prompt_hash for prompt in asked if prompt is not None}
    candidates = [
        Conversation(tuple(turn for turn in sample.messages if turn["role"] != "system"))
        for source in settings.train
        for sample in islice(_conversations(source), MOST_ROWS)
        if sample.tools is None and sample.prompt_hash not in taken
    ]
    if len(candidates) < count:
        raise DataError(
            f"prompting.shots: {count} examples are asked for, and {len(candidates)} training rows "
            "have a prompt and a reply that the evaluation does not ask for; use fewer"
        )
    return random.Random(seed).sample(candidates, count)


def _conversations(source: Source) -> Iterator[Conversation]:
    """Yield the rows that end with a reply; rows that cannot be read are no examples."""
    located = locate(source)
    layout = layout_of(located)
    for raw in read(located):
        if not isinstance(raw, RawRow):
            continue
        try:
            sample = layout.convert(raw.values)
        except DataError:
            continue
        if isinstance(sample, Conversation) and sample.reply_at:
            yield Conversation(sample.messages[: sample.reply_at + 1], sample.tools)


def with_examples(
    prompt: Prompt, examples: Sequence[Conversation], renderer: Renderer
) -> tuple[TokenRow, Prompt]:
    """Return what is asked with `examples` as earlier turns, as a row and as a prompt.

    They stand behind the system turn. In the row the same reply is supervised as without them.

    Raises:
        DataError: the template writes the turns otherwise once others stand before them, or the
            row has tools, which a prompt does not keep.
    """
    alone = renderer.prompt(_whole(prompt.messages, prompt.reference[0]))
    if alone is None or alone.input_ids != prompt.input_ids:
        raise DataError(
            "prompting.shots: an evaluation row has tools, or turns that the chat template cannot "
            "write twice alike; use shots: 0"
        )
    system = [turn for turn in prompt.messages[:1] if turn["role"] == "system"]
    # A turn of weight 0 is read and carries no loss.
    shown = [
        turn | {"weight": 0} if turn["role"] == "assistant" else turn
        for example in examples
        for turn in example.messages
    ]
    turns = [*system, *shown, *prompt.messages[len(system) :]]
    sample = _whole(turns, prompt.reference[0])
    longer = renderer.prompt(sample)
    assert longer is not None  # noqa: S101 - it has turns before a reply
    return renderer.row(sample), Prompt(longer.input_ids, list(prompt.reference), turns)


def _whole(before: Sequence[Values], reply: str) -> Conversation:
    return Conversation((*before, {"role": "assistant", "content": reply}))
