"""Preference losses and their gradients against TRL's own trainers, over the same batches."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_llama, tiny_tokenizer
from tunesmith.objectives.preference import Preference

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PROMPTS = ["Say yes", "Why?", "Count to three, slowly", "Hm"]
CHOSEN = [" yes", " because", " one two three", " hm hm hm"]
REJECTED = [" no, and no again", " why not", " 3", " what"]
BETA = 0.3


def trained_and_frozen() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model, and the one that it started from."""
    torch.manual_seed(0)
    frozen = tiny_llama()
    torch.manual_seed(5)
    trained = copy.deepcopy(frozen)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return trained, frozen


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """What both trainers are told: the CPU, float32, and one batch of all rows."""
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_dropout": True}
    size = {"per_device_train_batch_size": len(PROMPTS), "max_length": 128}
    return {"output_dir": str(folder), "gradient_checkpointing": False, **plain, **size, **more}


def theirs(trainer: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The first batch of a trainer and its loss, with gradients left in its model."""
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return batch, loss.detach()


def ours(
    objective: Preference, model: torch.nn.Module, frozen: torch.nn.Module, batch: dict[str, Any]
) -> torch.Tensor:
    """The objective's mean loss over a batch, with gradients left in `model`."""
    with torch.no_grad():
        batch["reference"] = objective.log_probs(frozen, batch)
    terms = objective.loss(model, batch)
    loss = terms.total / terms.count
    loss.backward()
    return loss.detach()


def sequences(ids: torch.Tensor, mask: torch.Tensor, completion: torch.Tensor) -> dict[str, Any]:
    labels = torch.where(completion.bool(), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_same_gradients(one: torch.nn.Module, other: torch.nn.Module) -> None:
    gradients = {name: p.grad for name, p in one.named_parameters()}
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "ipo", "hinge"])
def test_losses_of_pairs_are_those_of_trl(loss: str, tmp_path: Path) -> None:
    trained, frozen = trained_and_frozen()
    model, smoothing = copy.deepcopy(trained), 0.1 if loss == "robust" else 0.0
    trainer = trl.DPOTrainer(
        model=trained,
        ref_model=copy.deepcopy(frozen),
        args=trl.DPOConfig(
            **settings(tmp_path, beta=BETA, loss_type=[loss], label_smoothing=smoothing)
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
        ),
        processing_class=tiny_tokenizer(None),
    )
    batch, expected = theirs(trainer)
    pairs = len(PROMPTS)
    mine = sequences(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    mine |= {"winners": torch.arange(pairs), "losers": torch.arange(pairs, 2 * pairs)}
    mine["pair_weights"] = torch.ones(pairs)
    objective = Preference(loss_type=loss, beta=BETA, label_smoothing=smoothing)
    torch.testing.assert_close(ours(objective, model, frozen, mine), expected)
    assert_same_gradients(trainer.model, model)


@pytest.mark.parametrize(
    "good", [[True, False, False, True], [True] * 4, [False] * 4], ids=["both", "good", "bad"]
)
def test_kto_is_that_of_trl(good: list[bool], tmp_path: Path) -> None:
    trained, frozen = trained_and_frozen()
    model = copy.deepcopy(trained)
    trainer = trl.KTOTrainer(
        model=trained,
        ref_model=copy.deepcopy(frozen),
        args=trl.KTOConfig(
            **settings(tmp_path, beta=BETA, desirable_weight=1.5, undesirable_weight=0.7)
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": PROMPTS, "completion": CHOSEN, "label": good}
        ),
        processing_class=tiny_tokenizer(None),
    )
    batch, expected = theirs(trainer)
    matched, mismatched = (
        [batch[f"{kind}{part}"] for part in ("input_ids", "attention_mask", "completion_mask")]
        for kind in ("", "KL_")
    )
    length = max(ids.shape[1] for ids, *_ in (matched, mismatched))
    parts = (
        torch.cat([torch.nn.functional.pad(t, (0, length - t.shape[1])) for t in both])
        for both in zip(matched, mismatched, strict=True)
    )
    rows = len(PROMPTS)
    mine = sequences(*parts)
    mine |= {"matched": torch.arange(rows), "mismatched": torch.arange(rows, 2 * rows)}
    mine["good"] = torch.as_tensor(batch["label"]).bool()
    objective = Preference(loss_type="kto", beta=BETA, desirable_weight=1.5, undesirable_weight=0.7)
    torch.testing.assert_close(ours(objective, model, frozen, mine), expected)
    assert objective.loss(model, mine).metrics["kl"] > 0.1  # at 0 the mean would not be looked at
    assert_same_gradients(trainer.model, model)
