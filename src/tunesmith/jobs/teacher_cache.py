"""The teacher's word on every row, computed once and kept, so that training needs no teacher."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, cast, overload

import torch

from tunesmith.data.collate import Collator
from tunesmith.data.collate_pairs import PairCollator
from tunesmith.data.collate_taught import TaughtCollator, TaughtSamples, sample_key
from tunesmith.data.prepare import CorpusRows
from tunesmith.data.rows import TokenRow
from tunesmith.data.stream import EpochStream
from tunesmith.data.teacher_file import Known, TeacherFile, TeacherReader
from tunesmith.errors import CheckpointError, SpecError
from tunesmith.jobs.base import base_fingerprint
from tunesmith.jobs.batches import over_batches
from tunesmith.jobs.teacher import (
    load_teacher,
    require_same_tokens,
    require_tokens,
    teacher_dtype,
)
from tunesmith.jobs.whole_file import ANOTHER_CACHE, whole_file, written
from tunesmith.models.output_head import output_head
from tunesmith.models.zoo import cache_dir
from tunesmith.objectives.sft import next_tokens
from tunesmith.ops.linear_divergence_top_k import linear_top_k, outcomes
from tunesmith.report.words import size
from tunesmith.types import IGNORE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tunesmith.data.corpus import Corpus
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.jobs.teacher import Teacher
    from tunesmith.objectives import Distillation
    from tunesmith.types import Batch

logger = logging.getLogger(__name__)

_FORMAT = "1"
"""Changes whenever the same rows and teacher would give other numbers."""
_INSTEAD = f"{ANOTHER_CACHE}, lower objective.top_k, or use objective.logits: live"


class Samples(Sequence[TokenRow]):
    """Every different sample of some rows, the longest first; read when it is asked for."""

    def __init__(self, rows: Sequence[TokenRow], targets: Callable[[TokenRow], int]) -> None:
        """Take the rows, each one sample, and what says how many tokens one has to predict."""
        self._rows = rows
        found: dict[bytes, tuple[int, int, int]] = {}
        for number, row in enumerate(rows):
            found.setdefault(sample_key(row), (-len(row.input_ids), number, targets(row)))
        self.keys = sorted(found, key=lambda key: (found[key][0], key))
        self._numbers = [found[key][1] for key in self.keys]
        counts = [found[key][2] for key in self.keys]
        starts = accumulate(counts, initial=0)
        self.places = dict(zip(self.keys, zip(starts, counts, strict=False), strict=True))
        """By key, where its positions begin among those of all, and how many they are."""
        self.positions = sum(counts)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        """Return one sample, or a list of them."""
        if isinstance(index, int):
            return self._rows[self._numbers[index]]
        return [self._rows[number] for number in self._numbers[index]]


def with_teacher(
    assembled: Assembled,
    objective: Distillation,
    peers: Peers,
    say: Callable[[str], None] | None = None,
    *,
    training: bool = True,
) -> Assembled:
    """Return the run with the teacher's likeliest tokens in its batches; the teacher is gone again.

    They are kept by a hash of rows and teacher, training and evaluation apart, and read from the
    file as batches need them; every process calls this alike.

    Args:
        assembled: the run, whose batches know nothing of a teacher.
        objective: the run's.
        peers: the processes; they share the cache's folder.
        say: told what is computed, and how large it is.
        training: whether batches are made of the training rows too.

    Raises:
        SpecError: rows are streamed, top_k is more than there are tokens, or the teacher has
            another vocabulary.
        ModelError: the teacher cannot be loaded.
        CheckpointError: what it says cannot be kept.
    """
    require_same_tokens(assembled.run, objective)
    plain = assembled.collate
    assert isinstance(plain, Collator | PairCollator)  # noqa: S101 - made for given replies
    parts = [_training_rows(assembled)] if training else []
    parts.append(assembled.data.evaluation)
    samples = [Samples(rows, plain.targets) for rows in parts if len(rows)]
    known = _Work(assembled, objective, peers, say).known(samples)
    return replace(assembled, collate=TaughtCollator(plain, known))


def _training_rows(assembled: Assembled) -> Sequence[TokenRow]:
    train = assembled.data.train
    if not isinstance(train, EpochStream):
        raise SpecError(
            "objective.logits: cached asks the teacher about all rows before training, and with "
            "data.streaming: true nobody knows them; use objective.logits: live, or streaming: "
            "false"
        )
    return CorpusRows(cast("Corpus", train.corpus))


@dataclass(frozen=True)
class _Work:
    """What the teacher's word is computed with."""

    assembled: Assembled
    objective: Distillation
    peers: Peers
    say: Callable[[str], None] | None

    def known(self, parts: Sequence[Samples]) -> list[TaughtSamples]:
        """Return the teacher's word on each of `parts`, out of the cache or computed now."""
        paths = self._paths(parts)
        files = list(zip(paths, parts, strict=True))
        # All compute, or none: a process that sees no file would wait for the others in vain.
        missing = [file for file in files if self.peers.any(self._read(*file) is None)]
        if missing:
            self._ask(missing)
            gc.collect()  # a model and its modules hold each other
            if self.peers.device.type == "cuda":
                torch.cuda.empty_cache()
        return [self._taught(*file) for file in files]

    def _paths(self, parts: Sequence[Samples]) -> list[Path]:
        teacher, head = self.objective.teacher, output_head(self.assembled.tuned.model)
        dtype = teacher_dtype(self.objective, self.peers.device)
        facts = [_FORMAT, base_fingerprint(teacher), str(dtype), teacher.attention]
        facts += [str(self.objective.temperature), str(self.objective.top_k)]
        facts += [str(len(head.weight)), type(self.assembled.collate).__name__]
        paths = []
        for samples in parts:
            found = hashlib.sha256(" ".join(facts).encode())
            for key in samples.keys:
                found.update(key)
            paths.append(cache_dir() / "teacher" / f"{found.hexdigest()}.safetensors")
        return paths

    def _taught(self, path: Path, samples: Samples) -> TaughtSamples:
        reader = self._read(path, samples)
        if reader is None:
            raise CheckpointError(
                f"{path} cannot be read in process {self.peers.rank}, though it was written; all "
                "processes need the same cache: set TUNESMITH_CACHE to a folder that they share"
            )
        return TaughtSamples(reader, samples.places)

    def _read(self, path: Path, samples: Samples) -> TeacherReader | None:
        if not path.exists():
            return None
        try:
            return TeacherReader(path, positions=samples.positions, k=self.objective.top_k)
        except (ValueError, OSError) as error:
            logger.warning("%s is damaged (%s); it is computed again", path, error)
            return None

    def _ask(self, missing: Sequence[tuple[Path, Samples]]) -> None:
        """Write the files that are missing; only here is the teacher in memory."""
        teacher = load_teacher(self.objective, self.peers.device)
        vocab = self._vocab(teacher)
        for path, samples in missing:
            self._compute(path, samples, teacher, vocab)

    def _compute(self, path: Path, samples: Samples, teacher: Teacher, vocab: int) -> None:
        """Write a file, each process its share."""
        peers, k = self.peers, self.objective.top_k
        with whole_file(path, instead=_INSTEAD) if peers.is_main else nullcontext(path) as own:
            partial = peers.gather(own)[0]
            file = TeacherFile(partial, samples.positions, k, outcomes(k, vocab), vocab)
            if peers.is_main:
                self._tell(file, samples)
                file.create()
            peers.any(False)  # nobody writes before it is there
            with written(path, instead=_INSTEAD):
                self._write(file, samples, teacher)
        peers.any(False)  # nobody reads before it has its name

    def _vocab(self, teacher: Teacher) -> int:
        """Return the tokens that both models have a logit for; padded heads differ in size."""
        heads = (output_head(self.assembled.tuned.model), output_head(teacher.model))
        vocab = min(len(head.weight) for head in heads)
        require_tokens(self.objective, vocab)
        return vocab

    def _tell(self, file: TeacherFile, samples: Samples) -> None:
        if self.say is not None:
            self.say(
                f"computing the teacher's logits of {len(samples):,} rows once: {file.positions:,} "
                f"positions x {file.k:,} tokens = {size(file.size)}, kept in {cache_dir()}"
            )

    def _write(self, file: TeacherFile, samples: Samples, teacher: Teacher) -> None:
        def write(some: list[TokenRow], batch: Batch) -> None:
            places = (next_tokens(batch).flatten() != IGNORE).nonzero().squeeze(-1)
            states = teacher.states(batch)
            found = linear_top_k(
                states.hidden.flatten(0, 1)[places],
                states.head,
                file.k,
                vocab=file.vocab,
                temperature=self.objective.temperature,
            )
            start, _ = samples.places[sample_key(some[0])]
            file.write(start, Known(*(part.cpu().numpy() for part in found)))

        over_batches(self.assembled, self.peers, samples, write)
