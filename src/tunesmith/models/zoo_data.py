"""From the archives of two packages to JSONL data sets."""

from __future__ import annotations

import hashlib
import html
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from tunesmith.types import JSON

DOMAINS: Final = {
    "movie": "Sentences of movie reviews",
    "product": "Sentences of product reviews",
    "editorial": "Sentences of newspaper editorials",
    "tweet": "Tweets",
}
_FILES: Final = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
    "tweet": "tweets",
}
# fmt: off
LANGUAGES: Final = (
    "bengali", "chinese", "dutch", "english", "french", "german", "hebrew", "hindi",
    "hinglish", "indonesian", "italian", "japanese", "korean", "marathi", "oriya", "persian",
    "portuguese", "russian", "spanish", "swedish", "tamil", "telugu", "thai",
    "traditionalchinese", "turkish", "ukrainian", "urdu", "yoruba",
)
# fmt: on
_TEST_ROWS_A_LABEL: Final = 200

Row = dict[str, JSON]


def convert_sentiment(archive: Path, target: Path) -> None:
    """Write `<domain>/train.jsonl` and `<domain>-polarity/{train,test}.jsonl` into `target`.

    Source: Hutto & Gilbert 2014, "VADER", ICWSM-14: each sentence with the mean rating of 20
    people. Of the polarity sets 400 rows are held out, 200 a label, chosen by the hash of their
    text, so the split never changes and no text is on both sides.
    """
    with tarfile.open(archive) as outer:
        name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = io.BytesIO(_member(outer, name))
    with tarfile.open(fileobj=inner) as files:
        for domain, file in _FILES.items():
            rows = list(_rated(_member(files, f"hutto_ICWSM_2014/{file}_GroundTruth.txt")))
            train, test = split_polarity(rows)
            _write(target / domain / "train.jsonl", rows)
            _write(target / f"{domain}-polarity" / "train.jsonl", train)
            _write(target / f"{domain}-polarity" / "test.jsonl", test)


def _member(files: tarfile.TarFile, name: str) -> bytes:
    file = files.extractfile(name)
    if file is None:
        raise AssertionError(f"{name} is not a file in the pinned archive")
    return file.read()


def _rated(content: bytes) -> Iterator[Row]:
    for line in content.decode("utf-8").split("\n"):
        if line.strip():
            name, rating, text = line.rstrip("\r").split("\t")
            yield {"id": name, "text": html.unescape(text).strip(), "rating": float(rating)}


def split_polarity(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows with |rating| >= 1, labelled, as (train, test); equal texts are kept once."""
    unique: dict[str, Row] = {}
    for row in rows:
        rating = float(str(row["rating"]))
        if abs(rating) >= 1:
            label = "positive" if rating > 0 else "negative"
            unique.setdefault(_text_hash(row), row | {"label": label})
    test: set[str] = set()
    for label in ("positive", "negative"):
        of_label = sorted(key for key, row in unique.items() if row["label"] == label)
        test.update(of_label[:_TEST_ROWS_A_LABEL])
    train = [row for key, row in unique.items() if key not in test]
    return train, [unique[key] for key in sorted(test)]


def _text_hash(row: Row) -> str:
    text = " ".join(str(row["text"]).casefold().split())
    return hashlib.sha256(text.encode()).hexdigest()


def convert_dialogues(archive: Path, target: Path) -> None:
    """Write `<language>/train.jsonl` into `target`: id, topic and messages of each dialogue."""
    with zipfile.ZipFile(archive) as files:
        for language in LANGUAGES:
            start = f"chatterbot_corpus/data/{language}/"
            names = sorted(n for n in files.namelist() if n.startswith(start))
            rows = [row for name in names for row in _dialogues(name, files.read(name))]
            _write(target / language / "train.jsonl", rows)


def _dialogues(name: str, content: bytes) -> Iterator[Row]:
    topic = Path(name).stem
    # safe_load builds plain values only.
    document: dict[str, Any] = yaml.safe_load(content)
    for index, turns in enumerate(document["conversations"]):
        # A last turn that nobody answers teaches nothing.
        answered = [turn.strip() for turn in turns[: len(turns) // 2 * 2]]
        messages: list[JSON] = [
            {"role": ("user", "assistant")[place % 2], "content": turn}
            for place, turn in enumerate(answered)
        ]
        if messages and all(answered):
            yield {"id": f"{topic}-{index}", "topic": topic, "messages": messages}


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
