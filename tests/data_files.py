"""Small files of data for tests."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tunesmith.data.settings import Source
from tunesmith.data.sources import locate, read


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    """Write one JSON value a line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def exchanges(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Prompt/completion rows of different lengths, each told apart by its number."""
    return [
        {"prompt": f"ask {i}" + "?" * (i % 5), "completion": f"say {i}" + "!" * (i * 7 % 11)}
        for i in range(start, start + count)
    ]


def values(path: Path | str, **settings: object) -> list[object]:
    """Read all rows of a source as plain values; bad rows as their messages."""
    rows = read(locate(Source(path=str(path), **settings)))
    return [getattr(row, "values", None) or row.message for row in rows]


def texts(rows: Sequence[object], tokenizer: object) -> list[str]:
    """Decode rows of tokens."""
    return [tokenizer.decode(row.input_ids.tolist()) for row in rows]
