"""One tokenising process: `python -m tunesmith.data.worker PART`, started by `tokenise`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from tunesmith.data.formats import Layout
from tunesmith.data.rows import Position
from tunesmith.data.settings import Source
from tunesmith.data.sources import Located
from tunesmith.data.tokenise import Job, write_rows
from tunesmith.errors import DataError


def work(part: Path) -> None:
    """Tokenise this process's share of a source into `part`; a bad row is left in error.txt."""
    order = json.loads((part / "order.json").read_text(encoding="utf-8"))
    source = Source.model_validate(order["source"])
    job = Job(
        located=Located(source, tuple(Path(file) for file in order["files"])),
        layout=Layout(order["layout"], source),
        tokenizer=AutoTokenizer.from_pretrained(order["tokenizer"]),
        supervise=order["supervise"],
        on_bad_row=order["on_bad_row"],
        encoder_decoder=order["encoder_decoder"],
    )
    first, of = order["share"]
    try:
        write_rows(job, part, start=Position(*order["start"]), share=(first, of))
    except DataError as error:
        (part / "error.txt").write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
