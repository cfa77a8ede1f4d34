"""Measuring preferences on the evaluation rows, which are judged as one batch of them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tunesmith.data.pairs_collate import judgements
from tunesmith.jobs.batches import over_batches
from tunesmith.jobs.reference import completion_of
from tunesmith.jobs.row_sums import summed_by_row
from tunesmith.objectives.log_probs import ReplyLogProbs, reply_log_probs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from tunesmith.data.pairs import PairRow
    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.objectives import Preference
    from tunesmith.types import Batch


def measured_by_row(
    assembled: Assembled, objective: Preference, peers: Peers, rows: Sequence[PairRow]
) -> dict[str, NDArray[np.float64]]:
    """Return `loss` and the objective's metrics of each row, (rows,) float64, by name.

    The log-probabilities of all replies come first, batch by batch, and the losses after them. So
    the z0 of kto (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8) is max(0, mean of r over the
    mismatched replies of all `rows`), whatever `evaluation.batch_size` and the number of processes;
    and since a row's mismatched reply was chosen when the data were read, the order of `rows` does
    not matter. A row with several pairs has the mean of theirs, as in training.
    """
    sums, lengths, *reference = _log_probs(assembled, peers, rows)
    policy, known = ReplyLogProbs(sums, lengths), judgements(rows)
    terms = objective.terms(policy, known, reference[0] if reference else None)
    pairs = [max(1, len(row.winners)) for row in rows]  # a labelled reply has none
    found = summed_by_row({"loss": terms.losses} | terms.metrics, terms.weights, pairs)
    return {name: totals / found.weights for name, totals in found.totals.items()}


def _log_probs(assembled: Assembled, peers: Peers, rows: Sequence[PairRow]) -> Tensor:
    """Return log p of each reply, its tokens, and log p under the frozen model where it is asked.

    Returns:
        (2 or 3, replies of all rows) float64 on the CPU, the same in every process.
    """
    model = assembled.program.model
    complete = completion_of(assembled.run, assembled.tuned)

    def said(_: list[PairRow], batch: Batch) -> Tensor:
        whole = batch if complete is None else complete(batch)
        found = [*reply_log_probs(model, whole)]
        if "reference" in whole:
            found.append(whole["reference"])
        return torch.stack(found).cpu()

    return torch.cat(over_batches(assembled, peers, rows, said), dim=1).double()
