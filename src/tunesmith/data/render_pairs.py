"""From a sample to what an encoder reads and what a decoder is to write.

A row is both side by side: first what is read, unsupervised, then what is written, supervised to
its end. So rows are stored, cut and counted like all others, and the first supervised token tells
the two apart.
"""

from __future__ import annotations

from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunesmith.data.conversation import Sample, Text
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Prompt, TokenRow
from tunesmith.errors import DataError
from tunesmith.models.encoder_decoder import read_ids, written_ids


class PairRenderer(Renderer):
    """Turns samples into rows of tokens for an encoder-decoder and its tokenizer.

    The turns before the last reply are read, as the chat template writes them, and the reply is
    written, with eos behind it.

    Raises:
        DataError: all is to be supervised, but what is read is not predicted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        supervise: Literal["assistant", "all"] = "assistant",
    ) -> None:
        super().__init__(tokenizer, supervise=supervise)
        if supervise == "all":
            raise DataError(
                "data.supervise: all: an encoder-decoder predicts what it writes and not what it "
                "reads; use assistant"
            )

    def row(self, sample: Sample) -> TokenRow:
        """Return what is read and what is written, uncut, the latter supervised.

        A reply of weight 0 is not supervised, so nothing can be learnt from the row.

        Raises:
            DataError: there is no reply, nothing before it, or it is no text.
        """
        prompt = self.prompt(sample)
        if prompt is None or isinstance(sample, Text):
            raise DataError(
                "has no prompt and reply: an encoder-decoder reads the one and writes the other; "
                "name the columns of both in `data.train` (prompt, completion), or leave the row "
                "out"
            )
        if not prompt.input_ids:
            raise DataError("has an empty prompt, so there is nothing to read")
        reply = sample.messages[cast("int", sample.reply_at)]
        written = written_ids(self.tokenizer, prompt.reference[0])
        ids = np.array([*prompt.input_ids, *written], np.int32)
        mask = np.arange(len(ids)) >= len(prompt.input_ids)
        return TokenRow(ids, mask & (reply.get("weight") != 0), (len(ids),))

    def prompt(self, sample: Sample) -> Prompt | None:
        """Return what is read before the last reply, and the reply; None where nothing asks.

        Raises:
            DataError: the template cannot render the row, or the reply calls tools.
        """
        if isinstance(sample, Text) or not sample.reply_at:
            return None
        before, reply = sample.messages[: sample.reply_at], sample.messages[sample.reply_at]
        if sample.tools or reply.get("tool_calls"):
            raise DataError("has tools, which encoder-decoders have no template for; leave it out")
        ids = read_ids(self.tokenizer, list(before))
        return Prompt(ids, [str(reply["content"])], list(before))


def renderer_for(
    tokenizer: PreTrainedTokenizerBase,
    *,
    supervise: Literal["assistant", "all"],
    encoder_decoder: bool,
) -> Renderer:
    """Return what makes rows for one kind of model."""
    kind = PairRenderer if encoder_decoder else Renderer
    return kind(tokenizer, supervise=supervise)


def apart(row: TokenRow) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the tokens of a row that are read, and those that are written."""
    at = int(row.supervised.argmax())
    return row.input_ids[:at], row.input_ids[at:]
