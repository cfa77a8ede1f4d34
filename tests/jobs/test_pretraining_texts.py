"""Runs that learn from their own replies and go on learning from texts (PPO-ptx)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tunesmith
from reply_runs import StopError, adapter, events, kill_after, run_of, train_in_two_processes
from tiny import tiny_llama
from tunesmith import LoRA, attach
from tunesmith.data.collate_replies import ReplyCollator, ReplyRow, reply_row
from tunesmith.data.rows import TokenRow
from tunesmith.engine.distribution import Peers
from tunesmith.errors import SpecError
from tunesmith.jobs.assemble import assemble
from tunesmith.jobs.experience import Experience
from tunesmith.jobs.full_batch import full_batch
from tunesmith.jobs.plan import plan
from tunesmith.methods.value_head import ValueHead
from tunesmith.models.attention import enable_segments
from tunesmith.models.loading import load_model
from tunesmith.objectives import GRPO, PPO
from tunesmith.types import Batch

ALONE = Peers(torch.device("cpu"))
REWARDS = [{"kind": "exact"}]
TEXTS = ["the sea is blue and wide", "a bird sings", "rain falls on the old stone road", "yes"]


def with_texts(folder: Path, model: Path, /, *, name: str = "grpo", **changes: Any) -> Any:
    """Six steps of four replies, each with three of the texts."""
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    run = run_of(folder, model, data={"pretraining": [{"path": str(path)}]}, **changes)
    objective = run.objective.model_dump() | {"pretraining_rows": 3}
    if name == "ppo":
        kept = ("rewards", "rollout", "epochs", "kl", "pretraining_rows")
        objective = {"name": "ppo"} | {key: objective[key] for key in kept}
    return tunesmith.Run(**(run.model_dump() | {"objective": objective}))


def run_with_rows(folder: Path, model: Path, rows: int, /, **train: int) -> Any:
    """Roll-outs of sixteen replies, each taken twice, and so many of the texts in each step."""
    objective = {"rollout": {"replies": 16, "max_new_tokens": 6}, "epochs": 2}
    run = with_texts(folder, model, objective=objective, train=train)
    objective = run.objective.model_copy(update={"pretraining_rows": rows})
    return run.model_copy(update={"objective": objective})


def text_row(*ids: int) -> TokenRow:
    return TokenRow(
        torch.tensor(ids, dtype=torch.int32).numpy(),
        torch.ones(len(ids), dtype=torch.bool).numpy(),
        (len(ids),),
    )


def replies_with(*texts: tuple[TokenRow, ...], scale: float) -> list[ReplyRow]:
    names = ("advantages", "old_log_probs", "old_values", "returns")
    rows = []
    for number, own in enumerate(texts):
        row = reply_row([5, 6, 7], [8 + number, 9, 10])
        values = {name: torch.linspace(-1, 1, 3).numpy() for name in names}
        rows.append(ReplyRow(row.row, values, own, scale))
    return rows


def plain_nats(model: torch.nn.Module, rows: list[TokenRow]) -> torch.Tensor:
    """-log p of each token but the first, summed over whole logits."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.int64)[None]
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
    return total


@pytest.mark.parametrize("padding", ["right", "free"])
@pytest.mark.parametrize(
    "objective",
    [
        PPO(rewards=REWARDS, value_weight=0.0, kl=0.0, pretraining_weight=0.7),
        GRPO(rewards=REWARDS, pretraining_weight=0.7),
        GRPO(rewards=REWARDS, mean_over="tokens", pretraining_weight=0.7),
    ],
)
def test_the_loss_and_its_gradient_are_those_of_the_replies_and_of_the_texts(
    objective: PPO | GRPO, padding: Any
) -> None:
    tuned = attach(tiny_llama().double(), LoRA(rank=2))
    attach(tuned, ValueHead(), name="value")
    for parameter in tuned.trainable().values():
        parameter.data = torch.randn_like(parameter, dtype=torch.float64) / 5
    model = tuned.model
    if padding == "free":
        enable_segments(model)
    texts = [text_row(3, 4, 5, 6, 7), text_row(9, 8), text_row(11, 12, 13)]
    rows = replies_with((texts[0], texts[1]), (texts[2],), (), scale=0.25)
    collate = ReplyCollator(0, padding)
    batch = collate(rows)
    alone: Batch = {k: v for k, v in batch.items() if k not in {"texts", "text_scale"}}
    weights = [p for name, p in model.named_parameters() if "lora" in name]

    terms = objective.loss(model, objective.prepared(batch))
    nats = plain_nats(model, texts)
    expected = objective.loss(model, alone).total + 0.7 * 0.25 * nats
    torch.testing.assert_close(terms.total, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms.metrics["pretraining_loss"], 0.25 * nats.detach())
    assert terms.count == objective.loss(model, alone).count
    found = torch.autograd.grad(terms.total, weights)
    plain = torch.autograd.grad(expected, weights)
    torch.testing.assert_close(found, plain, rtol=1e-8, atol=1e-10)

    # A step in several micro-batches, of which the last has no text.
    parts = [objective.loss(model, collate([row])) for row in rows]
    torch.testing.assert_close(sum(part.total for part in parts), terms.total)
    assert all("pretraining_loss" in part.metrics for part in parts)


def test_a_step_has_so_many_texts_and_their_loss_is_a_mean_over_their_tokens(
    tmp_path: Path, tiny_model: Path
) -> None:
    for changes in ({"mean_over": "tokens"}, {"mean_over": "replies"}):
        run = with_texts(tmp_path, tiny_model)
        objective = run.objective.model_copy(update=changes)
        assembled = assemble(run.model_copy(update={"objective": objective}), ALONE, lambda _: None)
        assembled.program.objective = objective
        rewards = _Equal()
        stream = Experience(assembled, ALONE, rewards)  # type: ignore[arg-type]
        seen = set()
        for _ in range(4):
            rows = stream.take(4)
            texts = [text for row in rows for text in row.texts]
            assert len(texts) == 3
            assert max(len(row.texts) for row in rows) == 1
            seen |= {text.input_ids.tobytes() for text in texts}
            batch = assembled.collate(rows)
            terms = objective.loss(assembled.tuned.model, batch)
            tokens = sum(len(text.input_ids) - 1 for text in texts)
            mean = plain_nats(assembled.tuned.model, texts) / tokens
            told = terms.metrics["pretraining_loss"] / terms.count
            torch.testing.assert_close(told.double(), mean.double(), rtol=1e-5, atol=1e-6)
        assert len(seen) == len(TEXTS)  # an epoch and more: each was read


class _Equal:
    def parts(self, rows: list[Any]) -> dict[str, list[float]]:
        return {"none": [0.0] * len(rows)}

    def total(self, parts: dict[str, list[float]]) -> list[float]:
        return parts["none"]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_run_resumes_bit_for_bit_with_its_texts(
    tmp_path: Path, tiny_model: Path, name: str
) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_steps": 1}}
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = tunesmith.train(with_texts(tmp_path / "whole", tiny_model, name=name, **dict(changes)))
    run = with_texts(tmp_path / "cut", tiny_model, name=name, **dict(changes))
    with pytest.raises(StopError):
        tunesmith.train(run, listeners=[kill_after(4)])
    cut = tunesmith.train(run, resume=True)
    one, other = whole.directory.path, cut.directory.path
    assert all(torch.equal(t, adapter(other)[key]) for key, t in adapter(one).items())
    steps = events(one, "step_done")
    assert [e["loss"] for e in steps] == [e["loss"] for e in events(other, "step_done")]
    # The first ratio is exactly 1 as it is without texts: they have a forward of their own.
    assert steps[0]["metrics"]["ratio"] == 1.0
    summary = json.loads(whole.directory.summary.read_text())
    assert summary["data"]["pretraining"]["kept"] == len(TEXTS)


def test_the_texts_are_learned_from(tmp_path: Path, tiny_model: Path) -> None:
    """With equal rewards nothing else is."""
    losses = []
    for weight in (1e-9, 3.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        run = with_texts(folder, tiny_model, train={"max_steps": 48, "learning_rate": 0.03})
        rewards = [{"kind": "length", "free": 100, "limit": 200}]
        objective = run.objective.model_copy(update={"pretraining_weight": weight, "kl": 0.0})
        objective = type(objective)(**(objective.model_dump() | {"rewards": rewards}))
        path = tunesmith.train(run.model_copy(update={"objective": objective})).directory.path
        told = [e["metrics"]["pretraining_loss"] for e in events(path, "step_done")]
        losses.append((told[0], sum(told[-4:]) / 4))
    (before, still), (same, after) = losses
    assert same == pytest.approx(before)
    assert still == pytest.approx(before, abs=0.01)
    assert after < before - 0.03


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path, tiny_model: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one = tunesmith.train(with_texts(tmp_path / "one", tiny_model)).directory.path
    run = with_texts(tmp_path / "two", tiny_model, train={"batch_size": 2})
    train_in_two_processes(run, tmp_path / "two")
    two = tmp_path / "two" / "runs" / "job"
    for ours, theirs in zip(events(one, "step_done"), events(two, "step_done"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4, abs=1e-6)
        mine, other = ours["metrics"], theirs["metrics"]
        assert other["pretraining_loss"] == pytest.approx(mine["pretraining_loss"], rel=1e-5)


def test_the_plan_counts_them(tmp_path: Path, tiny_model: Path) -> None:
    run = with_texts(tmp_path, tiny_model)
    plain = run.model_copy(update={"data": run.data.model_copy(update={"pretraining": []})})
    assert plan(run).alone.peak > plan(plain).alone.peak


@pytest.mark.parametrize(("devices", "accumulation"), [(2, 2), (4, 1)])
def test_a_device_is_planned_with_its_share_of_the_texts(
    devices: int, accumulation: int, tmp_path: Path, tiny_model: Path
) -> None:
    whole, share = (
        plan(run_with_rows(tmp_path, tiny_model, number, accumulation_steps=accumulation))
        for number in (16, 16 // devices)
    )
    assert whole.on(1, "ddp") == whole.alone
    assert whole.on(devices, "ddp").activations == share.alone.activations
    assert whole.on(devices, "ddp").transient == share.alone.transient
    assert whole.on(devices, "zero2").activations == share.alone.activations
    assert share.alone.activations < whole.alone.activations


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_plan_counts_as_many_texts_as_a_process_takes_at_once(
    devices: int, tmp_path: Path, tiny_model: Path
) -> None:
    run = run_with_rows(tmp_path, tiny_model, 16, accumulation_steps=4 // devices)
    assembled = assemble(run, ALONE, lambda _: None)
    stream = Experience(assembled, ALONE, _Equal())  # type: ignore[arg-type]
    stream.take(16)  # writes the replies
    stream.peers = Peers(torch.device("cpu"), size=devices)
    rows = stream.take(16)
    processes = [rows[rank::devices] for rank in range(devices)]
    at_once = [own[start : start + 4] for own in processes for start in range(0, len(own), 4)]
    assert [sum(len(row.texts) for row in some) for some in at_once] == [4, 4, 4, 4]
    batch = full_batch(run, assembled.tuned.model, (4, 64), processes=devices)
    assert len(batch["texts"]["input_ids"]) == 4


def test_texts_are_planned_as_long_as_they_may_be_beside_short_replies(
    tmp_path: Path, tiny_model: Path
) -> None:
    run = run_with_rows(tmp_path, tiny_model, 3)
    rollout = run.objective.rollout.model_copy(update={"prompt_tokens": 4})
    objective = run.objective.model_copy(update={"rollout": rollout})
    run = run.model_copy(update={"objective": objective})
    planned = plan(run)
    assert planned.tokens == (4, 10)
    model = load_model(str(tiny_model)).model
    assert full_batch(run, model, planned.tokens)["texts"]["input_ids"].shape == (3, 64)


def test_a_run_without_replies_of_its_own_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    run = with_texts(tmp_path, tiny_model)
    run = run.model_copy(update={"objective": tunesmith.SFT()})
    with pytest.raises(SpecError, match=r"data.pretraining: .* sft samples none"):
        assemble(run, ALONE, lambda _: None)
