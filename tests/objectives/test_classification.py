"""Losses of classification against transformers' own heads and PyTorch's means."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from classifiers import CONFIGS
from tunesmith.objectives import Classification, TokenClassification
from tunesmith.types import IGNORE

LABELS = {
    "single": torch.tensor([0, 2, 1]),
    "multi": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]]),
    "regression": torch.tensor([0.5, -2.0, 3.0]),
}


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    return {
        "input_ids": ids.masked_fill(mask == 0, 2),
        "attention_mask": mask,
        "labels": LABELS[kind],
    }


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", LABELS)
def test_loss_and_gradients_are_those_of_transformers(family: str, kind: str) -> None:
    objective = Classification(kind=kind)
    outputs = 1 if kind == "regression" else 3
    settings = {"num_labels": outputs, "problem_type": objective.problem}
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | settings)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = batch_of(kind)
    expected = model(**batch).loss
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    terms = objective.loss(model, batch)
    ours = terms.total / terms.count
    ours.backward()
    torch.testing.assert_close(ours, expected)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("family", CONFIGS)
def test_token_loss_is_that_of_transformers(family: str) -> None:
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | {"num_labels": 3})
    model = AutoModelForTokenClassification.from_config(config).eval()
    batch = batch_of("single")
    labels = torch.randint(3, (3, 7), generator=torch.Generator().manual_seed(1))
    batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
    batch["labels"][0, ::2] = IGNORE
    terms = TokenClassification().loss(model, batch)
    torch.testing.assert_close(terms.total / terms.count, model(**batch).loss)
    assert terms.count == (batch["labels"] != IGNORE).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_give_pytorchs_weighted_mean(smoothing: float) -> None:
    logits = torch.randn(6, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 2, 2, 0])
    weights = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)
    objective = Classification(label_smoothing=smoothing)
    terms = objective.loss_of(logits, {"labels": labels, "class_weights": weights})
    expected = F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    torch.testing.assert_close(terms.total / terms.count, expected)


@pytest.mark.parametrize("kind", LABELS)
def test_parts_of_a_batch_sum_to_the_whole(kind: str) -> None:
    logits = torch.randn(3, 1 if kind == "regression" else 3)
    objective = Classification(kind=kind)
    weights = {"class_weights": torch.tensor([0.3, 1.0, 7.0])} if kind == "single" else {}
    whole = objective.loss_of(logits, {"labels": LABELS[kind], **weights})
    parts = [
        objective.loss_of(logits[i : i + 1], {"labels": LABELS[kind][i : i + 1], **weights})
        for i in range(3)
    ]
    torch.testing.assert_close(sum(p.total for p in parts), whole.total)
    assert sum(p.count for p in parts) == pytest.approx(whole.count)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ["a", "a"]}, "names a class twice"),
        ({"labels": ["a"]}, "at least 2 items"),
        ({"kind": "multi", "class_weights": "balanced"}, "are for kind single"),
        ({"class_weights": {"a": -1.0}}, "greater than or equal to 0"),
        ({"class_weights": {"a": float("nan")}}, "finite number"),
        ({"kind": "regression", "labels": ["a", "b"]}, "a regression has none"),
        ({"kind": "regression", "label_smoothing": 0.1}, "are for kind single"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Classification(**settings)
