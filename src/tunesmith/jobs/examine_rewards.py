"""Measuring a reward model on the evaluation rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.engine.evaluation import mean_loss, measuring
from tunesmith.errors import SpecError
from tunesmith.jobs.examine import Reply, chosen, shown
from tunesmith.jobs.reference import judged_collator
from tunesmith.measure import rewards as measure
from tunesmith.measure.classification import pearson, spearman
from tunesmith.measure.intervals import wilson_interval
from tunesmith.objectives import Reward

if TYPE_CHECKING:
    from tunesmith.data.pairs import PairRow
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.types import JSON

logger = logging.getLogger(__name__)

MOSTLY_LENGTH: Final = 0.7
"""Correlation of reward and length from which on the reward says little else."""


@dataclass
class RewardExaminer:
    """Measures the assembled reward model as it is; call it as often as wanted."""

    assembled: Assembled
    peers: Peers
    replies: list[Reply] = field(default_factory=list, init=False)
    """What the last examination said of the first `evaluation.samples` rows."""
    outcomes: dict[str, JSON] = field(default_factory=dict, init=False)
    """Of the last examination, what each row scored: metric to scores."""
    evidence: dict[str, JSON] = field(default_factory=dict, init=False)
    """Of the last examination: intervals, accuracy by margin, calibration, histogram."""

    def __post_init__(self) -> None:
        """Check that what is to be measured can be.

        Raises:
            SpecError: a metric of generated replies is asked for.
        """
        if names := list(self.assembled.run.evaluation.metrics):
            raise SpecError(
                f"evaluation.metrics: {names[0]} compares generated replies, and a reward model "
                "gives none; leave it out (its own metrics are always measured)"
            )

    @property
    def objective(self) -> Reward:
        """What the head learned."""
        return cast("Reward", self.assembled.run.objective)

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to measure on."""
        return len(self.assembled.data.evaluation) > 0

    def examine(self, step: int | None = None) -> dict[str, float]:
        """Return all metrics of the model as it is now; every process calls this alike."""
        del step  # replies are told by the one who asks
        settings, data = self.assembled.run.evaluation, self.assembled.data
        rows = cast("Sequence[PairRow]", chosen(data.evaluation, settings))
        metrics = mean_loss(
            self.assembled.program,
            rows,
            judged_collator(self.assembled),
            batch_size=settings.batch_size,
            peers=self.peers,
            autocast_dtype=self.assembled.autocast_dtype,
        )
        if self.objective.kind == "steps":
            return metrics
        rewards = self.rewards(rows)
        asked = list(chosen(list(data.examples), settings))[: settings.samples]
        self.replies = [
            Reply(shown(prompt), prompt.reference[0], " ".join(f"{r:.3f}" for r in reward))
            for prompt, reward in zip(asked, rewards, strict=False)
            if prompt is not None
        ]
        own = self._of_pairs if self.objective.kind == "pairs" else self._of_scores
        return metrics | own(rows, rewards)

    def rewards(self, rows: Sequence[PairRow]) -> list[NDArray[np.float64]]:
        """Return the reward of each reply, a row (replies,); each process judges its share."""
        size, model = self.assembled.run.evaluation.batch_size, self.assembled.tuned.model
        dtype, device = self.assembled.autocast_dtype, self.peers.device
        mine: list[tuple[int, list[NDArray[Any]]]] = []
        with measuring(self.assembled.program):
            for start in range(0, len(rows), size)[self.peers.rank :: self.peers.size]:
                some = list(rows[start : start + size])
                batch = self.peers.to_device(judged_collator(self.assembled)(some))
                with torch.autocast(device.type, dtype) if dtype else nullcontext():
                    found = self.objective.rewards(model, batch).double().cpu().numpy()
                bounds = np.cumsum([len(row.segments) for row in some])[:-1]
                mine.append((start, np.split(found, bounds)))
        shares = self.peers.gather(mine)
        parts = sorted((part for share in shares for part in share), key=lambda part: part[0])
        return [reward for _, some in parts for reward in some]

    def _of_pairs(
        self, rows: Sequence[PairRow], rewards: Sequence[NDArray[np.float64]]
    ) -> dict[str, float]:
        every = list(zip(rows, rewards, strict=True))
        lead = np.array([r[i] - r[j] for row, r in every for i, j in _pairs(row)])
        margins = np.array([margin for row in rows for margin in row.margins])
        lengths = np.array([n for row in rows for n in reply_lengths(row)], dtype=np.float64)
        longer = np.array(
            [n[i] - n[j] for row in rows for n in [reply_lengths(row)] for i, j in _pairs(row)]
        ).astype(np.float64)
        flat = np.concatenate(rewards)
        correlation = measure.length_correlation(flat, lengths)
        if correlation > MOSTLY_LENGTH:
            logger.warning(
                "the reward is mostly length: their rank correlation is %.2f; a policy would learn "
                "to write much, so add pairs whose better reply is the shorter one",
                correlation,
            )
        bars, counts = measure.reward_histogram(flat)
        calibrated = measure.calibration(lead)
        self.outcomes = {"accuracy": ((lead > 0) + 0.5 * (lead == 0)).tolist()}
        self.evidence = {
            "intervals": {"accuracy": list(wilson_interval(int((lead > 0).sum()), len(lead)))},
            "calibration": [bin_._asdict() for bin_ in calibrated.bins],
            "rewards": {"edges": list(bars), "counts": list(counts)},
        }
        if np.ptp(margins) > 0:
            by_margin = measure.accuracy_by(margins, lead)
            self.evidence["accuracy_by_margin"] = [bin_._asdict() for bin_ in by_margin]
        return {
            "accuracy": measure.pair_accuracy(lead),
            "length_only_accuracy": measure.pair_accuracy(longer),
            "calibration_error": calibrated.error,
            "length_correlation": correlation,
            "reward_mean": float(flat.mean()),
            "reward_std": float(flat.std()),
        }

    def _of_scores(
        self, rows: Sequence[PairRow], rewards: Sequence[NDArray[np.float64]]
    ) -> dict[str, float]:
        true = np.array([row.score for row in rows], dtype=np.float64)
        given = np.concatenate(rewards)
        self.outcomes = {"squared_error": ((true - given) ** 2).tolist()}
        return {"pearson": pearson(true, given), "spearman": spearman(true, given)}


def _pairs(row: PairRow) -> list[tuple[int, int]]:
    return list(zip(row.winners, row.losers, strict=True))


def reply_lengths(row: PairRow) -> list[int]:
    """Return the tokens of each reply of a row, without its prompt."""
    bounds = np.cumsum(row.segments)[:-1]
    return [int(part.sum()) for part in np.split(row.supervised, bounds)]
