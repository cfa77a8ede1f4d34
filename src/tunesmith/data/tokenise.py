"""From a located source to its table of tokens: in parallel where it is large, and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from tunesmith.data.files import kind_of
from tunesmith.data.formats import Layout, bad, layout_of, stop_at
from tunesmith.data.render import Renderer
from tunesmith.data.render_pairs import renderer_for
from tunesmith.data.rows import START, BadRow, Position, RawRow
from tunesmith.data.sources import Located, content_hash, read
from tunesmith.data.table import Reading, TableWriter, TokenTable, merge
from tunesmith.errors import DataError, SetupError

logger = logging.getLogger(__name__)

VERSION: Final = 2
"""Part of the cache key: goes up when the same row would give other tokens."""
BLOCK: Final = 500
"""Rows that one process tokenises before the next takes over."""
ROWS_ALONE: Final = 10_000
"""Rows after which further processes help: starting one takes as long as about that many rows."""
_POLL_SECONDS: Final = 0.1


class TokenisingProgress(NamedTuple):
    """How far tokenising has come."""

    source: str
    rows: int
    finished: bool


Progress = Callable[[TokenisingProgress], None]


@dataclass(frozen=True)
class Job:
    """One source and all that decides its tokens."""

    located: Located
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    supervise: Literal["assistant", "all"]
    on_bad_row: Literal["stop", "skip"]
    encoder_decoder: bool = False
    """Whether the model reads and writes apart."""

    @property
    def key(self) -> str:
        """A hash of everything that the tokens depend on, file contents included."""
        source = self.located.source
        parts = {
            "version": [VERSION, transformers.__version__, tokenizers.__version__],
            "content": content_hash(self.located),
            # The same bytes are other rows where they are read otherwise: JSONL as plain text.
            "kinds": [kind_of(file) for file in self.located.files],
            "layout": self.layout.name,
            "source": source.model_dump(
                include={"columns", "prompt", "completion", "system", "skip", "limit"}
            ),
            "supervise": self.supervise,
            "on_bad_row": self.on_bad_row,
            "encoder_decoder": self.encoder_decoder,
            "tokenizer": tokenizer_state(self.tokenizer),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def job_of(
    located: Located,
    tokenizer: PreTrainedTokenizerBase,
    *,
    supervise: Literal["assistant", "all"],
    on_bad_row: Literal["stop", "skip"],
    encoder_decoder: bool = False,
) -> Job:
    """Return the job of tokenising a source; its first row is read to recognise its format."""
    return Job(
        located,
        layout_of(located),
        tokenizer,
        supervise,
        on_bad_row,
        encoder_decoder,
    )


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all of a tokenizer that decides tokens: its model, template and special tokens."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are left over from the last call and do not touch ours.
    core = {key: core[key] for key in core if key not in {"padding", "truncation"}}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json.dumps([core, tokenizer.chat_template, special], sort_keys=True)


def tokenised(
    job: Job, *, cache: Path, workers: int = 0, progress: Progress | None = None
) -> TokenTable:
    """Return the table of a source, made now or found in the cache.

    Args:
        job: the source and what decides its tokens.
        cache: folder that keeps tables, by content hash.
        workers: processes; 0 takes as many as there are cores where the source is large.
        progress: called now and then, and at the end.

    Raises:
        DataError: a row is bad and `on_bad_row` is stop; the message names file and row.
        SetupError: a process died.
    """
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / job.key
    # Of several processes that need the same table one makes it, and the others wait.
    with FileLock(cache / f"{target.name}.lock"):
        if not target.is_dir():
            _make(job, target, workers or _cores(), progress)
        else:
            logger.info("tokens of %s come from the cache %s", job.located.name, target)
    table = TokenTable(target, job.located.name)
    _tell(progress, job, table.reading.rows, finished=True)
    return table


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _tell(progress: Progress | None, job: Job, rows: int, *, finished: bool = False) -> None:
    if progress is not None:
        progress(TokenisingProgress(job.located.name, rows, finished))


def _make(job: Job, target: Path, workers: int, progress: Progress | None) -> None:
    # A table appears under its name whole or not at all: built beside it, then renamed.
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        first = building / "part-0"
        first.mkdir()
        alone = ROWS_ALONE if workers > 1 else None
        stopped_at = write_rows(job, first, last=alone, progress=progress)
        if stopped_at is None:
            first.replace(target)
            return
        parts = _in_parallel(job, building, stopped_at, workers=workers, progress=progress)
        whole = building / "whole"
        whole.mkdir()
        merge([TokenTable(first), *parts], whole, block=BLOCK)
        whole.replace(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_rows(
    job: Job,
    directory: Path,
    *,
    start: Position = START,
    last: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Position | None:
    """Tokenise rows of a source into a table in `directory`.

    Args:
        job: the source and what decides its tokens.
        directory: an empty directory.
        start: where to begin.
        last: stop after this row of the source, counted from 1.
        share: (i, n): take only every n-th block, beginning with the i-th.
        progress: called after every block.

    Returns:
        Where it stopped, if there is more; None at the end of the source.

    Raises:
        DataError: a row is bad and the job stops at bad rows.
    """
    renderer = renderer_for(
        job.tokenizer, supervise=job.supervise, encoder_decoder=job.encoder_decoder
    )
    reading = Reading(job.located.name, job.layout.name)
    stopped_at = None
    with TableWriter(directory) as writer:
        for raw in read(job.located, start):
            ordinal = raw.end.total - 1
            if last is not None and ordinal >= last:
                break
            stopped_at = raw.end
            if ordinal // BLOCK % share[1] != share[0]:
                continue
            _write_row(job, renderer, raw, writer=writer, reading=reading)
            if (ordinal + 1) % BLOCK == 0:
                writer.flush()
                _tell(progress, job, reading.rows)
        else:
            stopped_at = None
        writer.finish(reading)
    return stopped_at


def _write_row(
    job: Job, renderer: Renderer, raw: RawRow | BadRow, *, writer: TableWriter, reading: Reading
) -> None:
    reading.rows += 1
    if isinstance(raw, RawRow):
        try:
            sample = job.layout.convert(raw.values)
            row = renderer.row(sample)
        except DataError as error:
            raw = bad(raw, error)
        else:
            writer.append(row, prompt_hash=sample.prompt_hash, ordinal=raw.end.total - 1)
            return
    if job.on_bad_row == "stop":
        raise stop_at(raw)
    reading.skip(raw.message)


def _in_parallel(
    job: Job, building: Path, start: Position, *, workers: int, progress: Progress | None
) -> list[TokenTable]:
    """Tokenise the rows from `start` on in processes of their own, and return their tables.

    The processes are fresh interpreters and not forks: a fork of a process with running threads,
    an initialised GPU or a used tokenizer can hang, and multiprocessing's spawn would run the
    user's script again.
    """
    job.tokenizer.save_pretrained(building / "tokenizer")
    parts = [building / f"part-{number}" for number in range(1, workers + 1)]
    processes: list[subprocess.Popen[bytes]] = []
    done = start.total
    try:
        for number, part in enumerate(parts):
            part.mkdir()
            order = _order(job, building, start, share=(number, workers))
            (part / "order.json").write_text(json.dumps(order), encoding="utf-8")
            processes.append(_start(part))
        while any(process.poll() is None for process in processes):
            time.sleep(_POLL_SECONDS)
            _tell(progress, job, done + sum(_rows_in(part) for part in parts))
            _check(processes, parts)
        _check(processes, parts)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [TokenTable(part) for part in parts]


def _order(
    job: Job, building: Path, start: Position, *, share: tuple[int, int]
) -> dict[str, object]:
    """Return what a worker has to know, as JSON; `tunesmith.data.worker` reads it."""
    return {
        "source": job.located.source.model_dump(),
        "files": [str(file) for file in job.located.files],
        "layout": job.layout.name,
        "tokenizer": str(building / "tokenizer"),
        "supervise": job.supervise,
        "on_bad_row": job.on_bad_row,
        "encoder_decoder": job.encoder_decoder,
        "start": list(start),
        "share": list(share),
    }


def _start(part: Path) -> subprocess.Popen[bytes]:
    # A worker is one core's work, so the tokenizer's and numpy's own threads only get in the way.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with (part / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "tunesmith.data.worker", str(part)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | quiet)


def _rows_in(part: Path) -> int:
    file = part / "length.bin"
    return file.stat().st_size // 8 if file.exists() else 0


def _check(processes: list[subprocess.Popen[bytes]], parts: list[Path]) -> None:
    for process, part in zip(processes, parts, strict=True):
        if (part / "error.txt").exists() and process.poll() is not None:
            raise DataError((part / "error.txt").read_text(encoding="utf-8"))
        if process.poll():
            log = (part / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
            raise SetupError(
                f"a tokenising process ended with code {process.returncode} "
                f"({log.splitlines()[-1] if log else 'it said nothing'}); try data.workers=1"
            )
