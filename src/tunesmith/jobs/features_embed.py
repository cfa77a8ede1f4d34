"""Tokenised texts to features, through the model or out of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.classification_collate import LabelledCollator
from tunesmith.errors import ModelError, SpecError
from tunesmith.jobs.base import base_fingerprint, load_base
from tunesmith.jobs.features_cache import features_path, read_features, write_features
from tunesmith.jobs.labelled import check_lengths, head_of_run
from tunesmith.models.embeddings import Pooling, embed
from tunesmith.models.heads import reads_last_token
from tunesmith.models.precision import DTYPES, best_dtype
from tunesmith.models.skeleton import config_of, kind_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from tunesmith.data.classification import LabelledRow
    from tunesmith.data.prepare import PreparedData
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.features_spec import FeatureRun


@dataclass
class Embedder:
    """Turns tokenised texts into features; the model is loaded when the cache lacks some."""

    job: FeatureRun
    data: PreparedData | None
    """The run's rows; none where it predicts."""
    peers: Peers
    pad_token_id: int
    say: Callable[[str], None]
    tokens: int = field(default=0, init=False)
    """Tokens that went through the model; none where all features were cached."""

    @property
    def prepared(self) -> PreparedData:
        """The run's rows, where it learns."""
        assert self.data is not None  # noqa: S101 - only who predicts leaves them out
        return self.data

    @cached_property
    def model(self) -> PreTrainedModel:
        """The frozen model."""
        self.say("loading the model")
        run, device = self.job.run, self.peers.device
        model = load_base(run.model, device=device, dtype=self.dtype, head=head_of_run(run))
        if self.data is not None:
            check_lengths(run, model, self.data)
        return model

    @cached_property
    def fingerprint(self) -> str:
        """What the model is, in a hash."""
        return base_fingerprint(self.job.run.model)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return DTYPES.get(self.job.run.model.dtype) or best_dtype(self.peers.device)

    @cached_property
    def pooling(self) -> Pooling:
        """What stands for a text.

        Raises:
            SpecError: the first token of a decoder is to.
        """
        decodes = kind_of(config_of(self.job.run.model)) == "decoder"
        asked = self.job.features.pooling
        if asked == "cls" and decodes:
            raise SpecError(
                f"features.pooling: cls: the first token of {self.job.run.model.name}, a decoder, "
                "sees no other token; use last or mean"
            )
        if asked == "auto":
            return "last" if decodes else "mean"
        return asked

    def features(self, rows: Sequence[LabelledRow]) -> NDArray[np.float32]:
        """Return the features of one or more rows, (rows, width) float32, cached where they are.

        Raises:
            ModelError: some are not finite.
        """
        path = features_path(
            rows, model=self.fingerprint, pooling=self.pooling, dtype=str(self.dtype)
        )
        features = read_features(path)
        if features is not None:
            self.say(f"features of {len(rows):,} texts are cached")
            return features
        features = self.compute(rows)
        write_features(path, features)
        return features

    def compute(self, rows: Sequence[LabelledRow]) -> NDArray[np.float32]:
        """Return the features of one or more rows, (rows, width) float32, past the cache.

        Raises:
            ModelError: some are not finite.
        """
        run, model = self.job.run, self.model
        self.say(f"embedding {len(rows):,} texts ({self.pooling})")
        collate = LabelledCollator(self.pad_token_id, "right", positions=reads_last_token(model))
        # Texts of like length side by side, so that little is padding.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
        found: list[NDArray[np.float32]] = []
        size = run.evaluation.batch_size
        for start in range(0, len(order), size):
            some = order[start : start + size]
            batch = self.peers.to_device(collate([rows[index] for index in some]))
            found.append(embed(model, batch, self.pooling).cpu().numpy())
        features = np.concatenate(found)[np.argsort(order)]
        if not np.isfinite(features).all():
            raise ModelError(
                f"model.dtype: {run.model.name} gives features in {self.dtype} that are not "
                "finite; use float32 or bfloat16"
            )
        self.tokens += sum(len(row.input_ids) for row in rows)
        return features
