"""Preferences on held-out rows: one z0 for all of them, and what each row adds to the means."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tunesmith
from pairs import pair_rows, run_of, write_rows
from tunesmith import DataSettings, EvaluationSettings, Source
from tunesmith.data.pairs import PairRow
from tunesmith.engine.distribution import Peers, connect
from tunesmith.jobs.assemble import Assembled, assemble
from tunesmith.jobs.examine import Examiner
from tunesmith.jobs.reference import with_reference
from tunesmith.objectives import Preference

BETA = 0.5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def moved(
    folder: Path, base: Path, objective: Preference, **changes: Any
) -> tuple[Assembled, Peers]:
    """A run whose policy finds all replies likelier than the reference, so that z0 is above 0."""
    run = run_of(folder, base, objective, **changes).resolved()
    peers = connect(run.engine)
    assembled = with_reference(assemble(run, peers, lambda _: None), peers)
    batch = assembled.collate(assembled.data.train.peek(16))
    weights = list(assembled.tuned.trainable().values())
    for _ in range(3):
        gradients = torch.autograd.grad(
            objective.log_probs(assembled.tuned.model, batch).sum(), weights
        )
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(0.03 * gradient.sign())
    return assembled, peers


def examined(
    assembled: Assembled, peers: Peers, **settings: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics, and what each row scored, under other settings of the evaluation."""
    evaluation = EvaluationSettings(samples=0, **settings)
    run = assembled.run.model_copy(update={"evaluation": evaluation})
    examiner = Examiner(replace(assembled, run=run), peers)
    return examiner.examine(), examiner.outcomes


def log_ratios(assembled: Assembled, rows: Sequence[PairRow]) -> Tensor:
    """log pi - log pi_ref of each reply, (rows, 2) float64, one at a time, of whole logits."""

    def log_p(ids: Tensor, supervised: Tensor) -> Tensor:
        logits = assembled.tuned.model(input_ids=ids[None]).logits.double().log_softmax(-1)
        return logits[0, :-1].gather(-1, ids[1:, None])[:, 0][supervised[1:]].sum()

    found = []
    for row in rows:
        ids, supervised = torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.supervised)
        replies = list(zip(ids.split(row.segments), supervised.split(row.segments), strict=True))
        with torch.no_grad():
            policy = torch.stack([log_p(*reply) for reply in replies])
            with assembled.tuned.disabled():
                found.append(policy - torch.stack([log_p(*reply) for reply in replies]))
    return torch.stack(found)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_the_held_out_loss_of_kto_has_one_z0_of_all_rows(
    tmp_path: Path, tiny_model: Path, batch_size: int
) -> None:
    assembled, peers = moved(tmp_path, tiny_model, Preference(loss="kto", beta=BETA))
    rows = list(assembled.data.evaluation)
    matched, mismatched = log_ratios(assembled, rows).T
    z0 = mismatched.mean().clamp(min=0)
    good = torch.tensor([row.good for row in rows])
    signed = torch.where(good, matched - z0, z0 - matched)
    losses = 1 - torch.sigmoid(BETA * signed)

    metrics, outcomes = examined(assembled, peers, batch_size=batch_size)
    assert z0 > 0.05  # at 0 the mean would not be looked at
    assert metrics["kl"] == pytest.approx(z0.item(), rel=1e-3)
    assert metrics["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert metrics["reward_accuracy"] == ((matched > z0) == good).double().mean()
    assert outcomes["loss"] == pytest.approx(losses.tolist(), rel=1e-4)
    assert "kl" not in outcomes


def test_the_order_of_held_out_rows_does_not_change_the_loss_of_kto(
    tmp_path: Path, tiny_model: Path
) -> None:
    assembled, peers = moved(tmp_path, tiny_model, Preference(loss="kto", beta=BETA))
    held_back = assembled.data.held_back
    assert held_back is not None
    turned = replace(held_back, rows=list(held_back.rows)[::-1])
    other = replace(assembled, data=replace(assembled.data, held_back=turned))
    metrics, outcomes = examined(assembled, peers, batch_size=3)
    other_metrics, other_outcomes = examined(other, peers, batch_size=3)
    assert metrics["kl"] > 0.05
    assert other_metrics == pytest.approx(metrics, rel=1e-5)
    assert other_outcomes["loss"] == pytest.approx(outcomes["loss"][::-1], rel=1e-5)


def test_a_live_reference_measures_what_a_cached_one_does(tmp_path: Path, tiny_model: Path) -> None:
    found = []
    for reference in ("cached", "live"):
        objective = Preference(loss="kto", beta=BETA, reference=reference)
        found.append(examined(*moved(tmp_path, tiny_model, objective), batch_size=3)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_each_rows_loss_of_dpo_is_its_formula(tmp_path: Path, tiny_model: Path) -> None:
    assembled, peers = moved(tmp_path, tiny_model, Preference(beta=BETA))
    chosen, rejected = log_ratios(assembled, list(assembled.data.evaluation)).T
    gap = BETA * (chosen - rejected)
    _, outcomes = examined(assembled, peers, batch_size=3)
    losses = torch.log1p(torch.exp(-gap))
    assert outcomes["loss"] == pytest.approx(losses.tolist(), rel=1e-4)
    assert outcomes["reward_accuracy"] == (gap > 0).double().tolist()
    assert outcomes["reward_margin"] == pytest.approx(gap.tolist(), abs=1e-4)


@pytest.mark.parametrize("loss", ["robust", "ipo", "hinge", "orpo", "simpo", "cpo"])
def test_the_means_over_rows_are_those_of_a_batch_of_all(
    tmp_path: Path, tiny_model: Path, loss: str
) -> None:
    objective = Preference(loss=loss, chosen_weight=0.3, weighting="wpo")
    assembled, peers = moved(tmp_path, tiny_model, objective)
    metrics, outcomes = examined(assembled, peers, batch_size=3)
    with torch.no_grad():
        terms = assembled.program(assembled.collate(list(assembled.data.evaluation)))
    expected = {"loss": terms.total, **terms.metrics}
    means = {name: value.item() / terms.count for name, value in expected.items()}
    assert metrics == pytest.approx(means, rel=1e-5, abs=1e-6)
    kept = {name: np.mean(scores) for name, scores in outcomes.items()}
    assert kept == pytest.approx(metrics)


def test_a_ranking_is_one_row_whose_pairs_share_its_weight(
    tmp_path: Path, tiny_model: Path
) -> None:
    rankings = [
        {
            "prompt": row["prompt"],
            "replies": [row["chosen"], row["rejected"], "perhaps"][: 2 + number % 2],
            "scores": [3, 1, 2][: 2 + number % 2],
        }
        for number, row in enumerate(pair_rows(24))
    ]
    path = write_rows(tmp_path / "rankings.jsonl", rankings)
    data = DataSettings(train=[Source(path=str(path))], holdout=8, max_length=128)
    assembled, peers = moved(tmp_path, tiny_model, Preference(), data=data)
    rows = list(assembled.data.evaluation)
    assert {len(row.winners) for row in rows} == {1, 3}
    _, outcomes = examined(assembled, peers, batch_size=3)
    for number, row in enumerate(rows):
        alone = assembled.program(assembled.collate([row]))
        assert outcomes["loss"][number] == pytest.approx(alone.total.item(), rel=1e-5)


def test_a_run_keeps_what_each_pair_scored(tmp_path: Path, tiny_model: Path) -> None:
    result = tunesmith.train(run_of(tmp_path, tiny_model, Preference()))
    kept = json.loads(result.directory.outcomes.read_text())
    for metric in ("loss", "reward_accuracy"):
        assert len(kept[metric]) == 16
        assert np.mean(kept[metric]) == pytest.approx(result.summary["after"][metric])
