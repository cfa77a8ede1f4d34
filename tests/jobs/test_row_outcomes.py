"""What reward models and distillations keep of each held-out row, and that it adds up."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from transformers import LlamaForCausalLM

import tunesmith
from pairs import pair_rows, run_of, write_rows
from reply_runs import train_in_two_processes
from tiny import tiny_llama, tiny_t5, tiny_tokenizer
from tunesmith import DataSettings, EvaluationSettings, ModelSettings, Run, Source
from tunesmith.data.pairs import PairRow
from tunesmith.data.rows import TokenRow
from tunesmith.engine.distribution import connect
from tunesmith.jobs.assemble import Assembled, assemble
from tunesmith.jobs.compare import compare
from tunesmith.jobs.comparison_spec import load_comparison
from tunesmith.jobs.comparison_statistics import statistic_of
from tunesmith.jobs.examine_labels import examiner_of
from tunesmith.jobs.reference import with_reference
from tunesmith.objectives import Distillation, Reward

RANKING = ["yes!", "no", "perhaps"]
REWARDS = [
    Reward(margin=0.5, centering=0.01),
    Reward(kind="scores"),
    Reward(kind="steps"),
]
TAUGHT = [
    {"logits": "live"},
    {"logits": "cached", "top_k": 5, "divergence": "reverse_kl"},
    {"logits": "live", "temperature": 2.0, "label_weight": 0.3, "divergence": "js"},
    {"logits": "cached", "top_k": 7, "temperature": 2.0, "label_weight": 0.3},
]
LAYOUTS = pytest.mark.parametrize("padding", ["right", "free"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tunesmith.jobs.evidence.store", lambda: tmp_path / "store")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    tiny_llama(hidden_size=48, initializer_range=0.2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def judged(kind: str) -> list[dict[str, Any]]:
    """Rows of unequal weight: rankings of two and three replies, replies of one to three steps."""
    rows = pair_rows(40)
    if kind == "pairs":
        return [
            {
                "prompt": row["prompt"],
                "replies": [reply + row["chosen"] for reply in RANKING[: 2 + n % 2]],
                "scores": [[3, 1, 2], [1, 3, 2]][n % 5 == 0][: 2 + n % 2],
            }
            for n, row in enumerate(rows)
        ]
    if kind == "scores":
        return [
            {"prompt": row["prompt"], "completion": row["chosen"], "score": n % 7 / 3}
            for n, row in enumerate(rows)
        ]
    return [
        {
            "prompt": row["prompt"],
            "completions": RANKING[: 1 + n % 3],
            "labels": [True, n % 2 == 0, False][: 1 + n % 3],
        }
        for n, row in enumerate(rows)
    ]


def reward_run(folder: Path, model: Path, objective: Reward, **changes: Any) -> Run:
    path = write_rows(folder / "judged.jsonl", judged(objective.kind))
    data = DataSettings(train=[Source(path=str(path))], holdout=13, max_length=128)
    return run_of(folder, model, objective, data=data, **changes)


def taught_run(
    folder: Path, model: Path, teacher: Path, how: dict[str, Any], /, **changes: Any
) -> Run:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"] * (1 + n % 3)}
        for n, row in enumerate(pair_rows(40))
    ]
    path = write_rows(folder / "taught.jsonl", rows)
    data = DataSettings(train=[Source(path=str(path))], holdout=13, max_length=128)
    objective = Distillation(teacher=ModelSettings(name=str(teacher), dtype="float32"), **how)
    return run_of(folder, model, objective, data=data, **changes)


def put_together(run: Run) -> Assembled:
    run = run.resolved()
    peers = connect(run.engine)
    return with_reference(assemble(run, peers, lambda _: None), peers, training=False)


def examined(assembled: Assembled, batch_size: int = 4) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics, and what is kept of each row, with so many rows at once."""
    evaluation = EvaluationSettings(samples=0, batch_size=batch_size)
    run = assembled.run.model_copy(update={"evaluation": evaluation})
    examiner = examiner_of(replace(assembled, run=run), connect(run.engine))
    return examiner.examine(), examiner.outcomes


def means(metrics: dict[str, float], outcomes: dict[str, Any]) -> dict[str, float]:
    """Each metric as `tunesmith compare` computes it of all 13 rows; those without are left out."""
    found = {name: statistic_of(outcomes, name) for name in metrics}
    assert {one.rows for one in found.values() if one is not None} == {13}
    return {name: one.on(np.arange(one.rows)) for name, one in found.items() if one is not None}


@LAYOUTS
@pytest.mark.parametrize("objective", REWARDS, ids=lambda one: one.kind)
def test_what_is_kept_of_a_reward_models_rows_has_the_metrics_as_its_mean(
    tmp_path: Path, tiny_model: Path, objective: Reward, padding: str
) -> None:
    engine = {"device": "cpu", "padding": padding}
    assembled = put_together(reward_run(tmp_path, tiny_model, objective, engine=engine))
    metrics, outcomes = examined(assembled)
    expected = {
        "pairs": {
            "loss", "accuracy", "length_only_accuracy",
            "reward_margin", "mean_reward", "reward_mean",
        },
        "scores": {"loss", "absolute_error", "mean_reward", "pearson", "spearman"},
        "steps": {"loss", "accuracy"},
    }  # fmt: skip
    found = means(metrics, outcomes)
    assert set(found) == expected[objective.kind]
    assert found == pytest.approx({name: metrics[name] for name in found}, abs=1e-6)


@LAYOUTS
@pytest.mark.parametrize("how", TAUGHT)
def test_what_is_kept_of_a_distillations_rows_has_the_metrics_as_its_mean(
    tmp_path: Path, tiny_model: Path, teacher: Path, how: dict[str, Any], padding: str
) -> None:
    engine = {"device": "cpu", "padding": padding}
    assembled = put_together(taught_run(tmp_path, tiny_model, teacher, how, engine=engine))
    metrics, outcomes = examined(assembled)
    assert means(metrics, outcomes) == pytest.approx(metrics, abs=1e-6)
    counts = [int(row.supervised.sum()) for row in assembled.data.evaluation]
    assert outcomes["loss"]["counts"] == outcomes["divergence"]["counts"] == counts
    assert len(set(counts)) > 2  # or rows would weigh the same


@pytest.mark.parametrize("objective", REWARDS, ids=lambda one: one.kind)
def test_the_metrics_of_a_reward_model_are_those_of_one_batch_of_all_rows(
    tmp_path: Path, tiny_model: Path, objective: Reward
) -> None:
    assembled = put_together(reward_run(tmp_path, tiny_model, objective))
    with torch.no_grad():
        terms = assembled.program(assembled.collate(list(assembled.data.evaluation)))
    expected = {"loss": terms.total, **terms.metrics}
    if objective.kind == "pairs":
        del expected["accuracy"]  # it is one over pairs where it is reported
    metrics, _ = examined(assembled)
    for name, total in expected.items():
        assert metrics[name] == pytest.approx(total.item() / terms.count, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 13])
@pytest.mark.parametrize("objective", REWARDS, ids=lambda one: one.kind)
def test_what_is_kept_of_a_reward_models_rows_is_that_of_any_batch_size(
    tmp_path: Path, tiny_model: Path, objective: Reward, batch_size: int
) -> None:
    assembled = put_together(reward_run(tmp_path, tiny_model, objective))
    metrics, outcomes = examined(assembled, batch_size=3)
    others, kept = examined(assembled, batch_size)
    assert others == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    same(kept, outcomes)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 13])
@pytest.mark.parametrize("how", TAUGHT)
def test_what_is_kept_of_a_distillations_rows_is_that_of_any_batch_size(
    tmp_path: Path, tiny_model: Path, teacher: Path, how: dict[str, Any], batch_size: int
) -> None:
    assembled = put_together(taught_run(tmp_path, tiny_model, teacher, how))
    metrics, outcomes = examined(assembled, batch_size=3)
    others, kept = examined(assembled, batch_size)
    assert others == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    same(kept, outcomes)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both have the same numbers of the same rows; sums in another order round otherwise."""
    assert "loss" in found
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if isinstance(values, list):
            assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-5)
            continue
        for part in values.keys() - {"kind"}:
            assert found[name][part] == pytest.approx(values[part], rel=1e-4, abs=1e-5)


def test_a_ranking_is_one_row_and_each_has_the_loss_of_its_formula(
    tmp_path: Path, tiny_model: Path
) -> None:
    objective = Reward(margin=0.5, centering=0.01)
    assembled = put_together(reward_run(tmp_path, tiny_model, objective))
    rows: list[PairRow] = list(assembled.data.evaluation)
    assert {len(row.winners) for row in rows} == {1, 3}
    _, outcomes = examined(assembled)
    losses = []
    for row in rows:
        r = rewards_alone(assembled, row)
        pairs = list(zip(row.winners, row.losers, row.margins, strict=True))
        each = [
            math.log1p(math.exp(-(r[i] - r[j] - 0.5 * m))) + 0.01 * (r[i] + r[j]) ** 2
            for i, j, m in pairs
        ]
        losses.append(sum(each) / len(pairs))
    assert outcomes["loss"] == pytest.approx(losses, rel=1e-4)
    assert outcomes["accuracy"]["counts"] == [len(row.winners) for row in rows]
    assert outcomes["reward_mean"]["counts"] == [len(row.segments) for row in rows]


def rewards_alone(assembled: Assembled, row: PairRow) -> list[float]:
    """The reward of each reply of a row at its last token, computed for one at a time."""
    replies = torch.from_numpy(row.input_ids).long().split(row.segments)
    return [outputs_alone(assembled, ids)[-1].item() for ids in replies]


def outputs_alone(assembled: Assembled, ids: Tensor) -> Tensor:
    """The head's output at each token, (tokens,)."""
    model = assembled.tuned.model
    with torch.no_grad():
        return model.score(model.model(input_ids=ids[None]).last_hidden_state)[0, :, 0]


def test_each_rows_loss_of_a_process_reward_is_its_formula(
    tmp_path: Path, tiny_model: Path
) -> None:
    assembled = put_together(reward_run(tmp_path, tiny_model, Reward(kind="steps")))
    rows: list[PairRow] = list(assembled.data.evaluation)
    assert len({len(row.steps) for row in rows}) == 3
    totals = []
    for row in rows:
        r = outputs_alone(assembled, torch.from_numpy(row.input_ids).long())
        s = [torch.sigmoid(r[place]).item() for place, _ in row.steps]
        right = [label for _, label in row.steps]
        totals.append(-sum(math.log(p if ok else 1 - p) for p, ok in zip(s, right, strict=True)))
    _, outcomes = examined(assembled)
    assert outcomes["loss"]["totals"] == pytest.approx(totals, rel=1e-4)
    assert outcomes["loss"]["counts"] == [len(row.steps) for row in rows]


@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_each_rows_divergence_is_its_formula(
    tmp_path: Path, tiny_model: Path, teacher: Path, label_weight: float
) -> None:
    how = {"temperature": 2.0, "label_weight": label_weight}
    assembled = put_together(taught_run(tmp_path, tiny_model, teacher, how))
    teaching = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    divergences, losses = [], []
    for row in assembled.data.evaluation:
        p, _ = log_probs(teaching, row, 2.0)
        q, _ = log_probs(assembled.tuned.model, row, 2.0)
        divergence = (p.exp() * (p - q)).sum().item()
        plain, targets = log_probs(assembled.tuned.model, row, 1.0)
        entropy = F.nll_loss(plain, targets, reduction="sum").item()
        divergences.append(divergence)
        losses.append((1 - label_weight) * 4 * divergence + label_weight * entropy)
    _, outcomes = examined(assembled)
    assert outcomes["divergence"]["totals"] == pytest.approx(divergences, rel=1e-4)
    assert outcomes["loss"]["totals"] == pytest.approx(losses, rel=1e-4)


def log_probs(model: Any, row: TokenRow, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities where a row is supervised, (tokens, vocab) float64, and the tokens."""
    ids, supervised = torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.supervised)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    return (logits / temperature).log_softmax(-1)[supervised[1:]], ids[1:][supervised[1:]]


def test_what_is_kept_of_an_encoder_decoders_rows_has_the_metrics_as_its_mean(
    tmp_path: Path,
) -> None:
    for name, seed in (("student", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        tiny_t5().save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    models = tmp_path / "student", tmp_path / "teacher"
    metrics, outcomes = examined(put_together(taught_run(tmp_path, *models, {"logits": "live"})))
    assert means(metrics, outcomes) == pytest.approx(metrics, abs=1e-6)


def compared(folder: Path, run: Run, metric: str) -> Any:
    """The findings of two methods on a run."""
    values = {
        "name": "two-ways", "output": str(folder / "compared"), "methods": ["lora", "ia3"],
        "seeds": 1, "learning_rates": 1, "metric": metric,
        "run": run.model_dump(mode="json", exclude={"name", "output", "method"}),
    }  # fmt: skip
    path = folder / "two-ways.yaml"
    path.write_text(yaml.safe_dump(values))
    return compare(load_comparison(path), path, lambda _: None)


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("pairs", "loss"), ("pairs", "accuracy"), ("scores", "loss"), ("steps", "loss")],
)
def test_reward_models_are_compared_with_intervals(
    tmp_path: Path, tiny_model: Path, kind: str, metric: str
) -> None:
    run = reward_run(tmp_path, tiny_model, Reward(kind=kind))
    findings = compared(tmp_path, run, metric)
    has_intervals(findings)


@pytest.mark.parametrize("metric", ["loss", "divergence"])
def test_distillations_are_compared_with_intervals(
    tmp_path: Path, tiny_model: Path, teacher: Path, metric: str
) -> None:
    how = {"logits": "cached", "top_k": 8, "temperature": 2.0}
    findings = compared(tmp_path, taught_run(tmp_path, tiny_model, teacher, how), metric)
    has_intervals(findings)


def has_intervals(findings: Any) -> None:
    best, other = findings.trained
    assert findings.facts["rows judged"] == 13
    for row in (best, other):
        assert row.low <= row.quality <= row.high
        assert row.low < row.high
    assert 0 < other.p_value <= 1


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "steps", "distillation"])
def test_two_processes_keep_what_one_does_in_the_rows_order(
    tmp_path: Path, tiny_model: Path, teacher: Path, kind: str
) -> None:
    kept = []
    for name, batch_size in (("one", 8), ("two", 4)):
        (tmp_path / name).mkdir()
        settings: dict[str, Any] = {
            "train": {"max_steps": 1, "batch_size": batch_size, "learning_rate": 1e-3},
            "evaluation": EvaluationSettings(samples=0, batch_size=3),
        }
        run = (
            taught_run(tmp_path / name, tiny_model, teacher, {"logits": "live"}, **settings)
            if kind == "distillation"
            else reward_run(tmp_path / name, tiny_model, Reward(kind=kind), **settings)
        )
        if name == "two":
            train_in_two_processes(run, tmp_path / name)
        else:
            tunesmith.train(run)
        kept.append(json.loads((tmp_path / name / "runs" / "job" / "outcomes.json").read_text()))
    same(kept[1], kept[0])
