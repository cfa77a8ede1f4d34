"""Measuring a reward model on the evaluation rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.pairs_collate import judgements
from tunesmith.jobs.batches import over_batches
from tunesmith.jobs.examine import Reply, chosen, judged_rows, shown
from tunesmith.jobs.examine_heads import HeadExaminer
from tunesmith.jobs.row_sums import ratios, summed_by_row
from tunesmith.measure import rewards as measure
from tunesmith.measure.classification import pearson, spearman
from tunesmith.measure.intervals import wilson_interval
from tunesmith.objectives import Reward

if TYPE_CHECKING:
    from tunesmith.data.pairs import PairRow
    from tunesmith.types import JSON, Batch

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
        outputs = self.outputs(rows)
        metrics = self._losses(rows, outputs)
        if self.objective.kind == "steps":
            return metrics
        asked = list(chosen(list(data.examples), settings))[: settings.samples]
        self.replies = [
            Reply(shown(prompt), prompt.reference[0], " ".join(f"{r:.3f}" for r in reward))
            for prompt, reward in zip(asked, outputs, strict=False)
            if prompt is not None
        ]
        own = self._of_pairs if self.objective.kind == "pairs" else self._of_scores
        return metrics | own(rows, outputs)

    def outputs(self, rows: Sequence[PairRow]) -> list[NDArray[np.float64]]:
        """Return a row's rewards, of its replies or its steps; each process judges its share."""
        objective, model = self.objective, self.assembled.tuned.model

        def outputs(_: list[PairRow], batch: Batch) -> NDArray[np.float64]:
            return objective.outputs(model, batch).cpu().double().numpy()

        every = np.concatenate(over_batches(self.assembled, self.peers, rows, outputs))
        of_steps = objective.kind == "steps"
        sizes = [len((row.steps or ()) if of_steps else row.segments) for row in rows]
        return np.split(every, np.cumsum(sizes)[:-1])

    def _losses(
        self, rows: Sequence[PairRow], outputs: Sequence[NDArray[np.float64]]
    ) -> dict[str, float]:
        """Return the loss and the objective's metrics; keep what each row adds to them.

        Prompts with pairs and scored replies weigh the same each, rows of steps by their steps.
        """
        objective = self.objective
        sizes = [max(1, len(row.winners)) for row in rows]
        if objective.kind == "steps":
            sizes = [len(row.steps or ()) for row in rows]
        terms = objective.terms(torch.from_numpy(np.concatenate(outputs)), judgements(rows))
        values = {"loss": terms.losses} | terms.metrics
        totals, weights = summed_by_row(values, terms.weights, sizes)
        if objective.kind == "steps":
            self.outcomes = {name: ratios(each, weights) for name, each in totals.items()}
            return {name: float(each.sum() / weights.sum()) for name, each in totals.items()}
        means = {name: each / weights for name, each in totals.items()}
        self.outcomes = {name: each.tolist() for name, each in means.items()}
        return {name: float(each.mean()) for name, each in means.items()}

    def _of_pairs(
        self, rows: Sequence[PairRow], rewards: Sequence[NDArray[np.float64]]
    ) -> dict[str, float]:
        leads = [_leads(row, r) for row, r in zip(rows, rewards, strict=True)]
        longer = [_leads(row, reply_lengths(row)) for row in rows]
        lead = np.concatenate(leads)
        margins = np.array([margin for row in rows for margin in row.margins])
        lengths = np.array([n for row in rows for n in reply_lengths(row)], dtype=np.float64)
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
        # Unlike the loss, these are means over all pairs or replies, whichever row they are of.
        self.outcomes |= {
            "accuracy": _kept([_right(of_row) for of_row in leads]),
            "length_only_accuracy": _kept([_right(of_row) for of_row in longer]),
            "reward_mean": _kept(rewards),
        }
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
            "length_only_accuracy": measure.pair_accuracy(np.concatenate(longer)),
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
        said = {"kind": "numbers", "true": true.tolist(), "predicted": given.tolist()}
        self.outcomes["predictions"] = said
        return {"pearson": pearson(true, given), "spearman": spearman(true, given)}


def _leads(row: PairRow, values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far the better reply of each pair of a row is ahead, (pairs,)."""
    of_reply = np.asarray(values, dtype=np.float64)
    return of_reply[list(row.winners)] - of_reply[list(row.losers)]


def _right(lead: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 for each pair whose better reply leads, and half for a tie, (pairs,)."""
    return (lead > 0) + 0.5 * (lead == 0)


def _kept(scores: Sequence[NDArray[np.float64]]) -> JSON:
    """Return what is kept for the mean over all scores, of which each row has some."""
    return ratios(map(np.sum, scores), map(len, scores))


def reply_lengths(row: PairRow) -> list[int]:
    """Return the tokens of each reply of a row, without its prompt."""
    bounds = np.cumsum(row.segments)[:-1]
    return [int(part.sum()) for part in np.split(row.supervised, bounds)]
