"""Measuring a reward model on the evaluation rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final, cast

import numpy as np
from numpy.typing import NDArray

from tunesmith.engine.evaluation import mean_loss
from tunesmith.jobs.batches import over_batches
from tunesmith.jobs.examine import Reply, chosen, judged_rows, shown
from tunesmith.jobs.examine_heads import HeadExaminer
from tunesmith.jobs.reference import by_row, judged_collator
from tunesmith.measure import rewards as measure
from tunesmith.measure.classification import pearson, spearman
from tunesmith.measure.intervals import wilson_interval
from tunesmith.objectives import Reward

if TYPE_CHECKING:
    from tunesmith.data.pairs import PairRow
    from tunesmith.types import Batch

logger = logging.getLogger(__name__)

MOSTLY_LENGTH: Final = 0.7
"""Correlation of reward and length from which on the reward says little else."""


class RewardExaminer(HeadExaminer):
    """Measures the assembled reward model as it is; call it as often as wanted."""

    model: ClassVar[str] = "reward model"
    may_ask: ClassVar[frozenset[str]] = frozenset()

    @property
    def objective(self) -> Reward:
        """What the head learned."""
        return cast("Reward", self.assembled.run.objective)

    def examine(self, step: int | None = None) -> dict[str, float]:
        """Return all metrics of the model as it is now; every process calls this alike."""
        del step  # replies are told by the one who asks
        settings, data = self.assembled.run.evaluation, self.assembled.data
        rows = cast("Sequence[PairRow]", judged_rows(data.evaluation, settings))
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
        model = self.assembled.tuned.model

        def rewards(some: list[PairRow], batch: Batch) -> list[NDArray[np.float64]]:
            return by_row(some, self.objective.rewards(model, batch).double())

        parts = over_batches(self.assembled, self.peers, rows, rewards)
        return [reward for part in parts for reward in part]

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
