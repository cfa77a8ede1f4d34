"""Whether a model knows every token that its rows are made of."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from tunesmith.data.asked import AskedData
from tunesmith.data.stream import EpochStream
from tunesmith.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.data.prepare import PreparedData
    from tunesmith.data.rows import TokenRow
    from tunesmith.spec import Run


def check_tokens(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: PreparedData
) -> None:
    """Check that the model embeds every token of training and evaluation.

    A tokenizer may name more tokens than the model has, as those of image models do, as long as
    no row uses them. Streamed rows are not known beforehand and not looked at.

    Raises:
        SpecError: a row has a token that the model has no embedding for.
    """
    embedded = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) < embedded:
        return
    highest = max((int(row.input_ids.max(initial=0)) for row in _rows(data)), default=0)
    if highest >= embedded:
        raise SpecError(
            f"model.tokenizer: '{run.model.tokenizer or run.model.name}' makes token {highest} "
            f"({tokenizer.convert_ids_to_tokens(highest)!r}) of a row, and {run.model.name} embeds "
            f"tokens 0 to {embedded - 1}; use the tokenizer that belongs to the model"
        )


def _rows(data: PreparedData) -> Iterable[TokenRow]:
    streams = [data.train, data.texts if isinstance(data, AskedData) else None]
    corpora = [stream.corpus for stream in streams if isinstance(stream, EpochStream)]
    learned = (corpus.row(number) for corpus in corpora for number in range(len(corpus)))
    return chain(learned, data.evaluation)
