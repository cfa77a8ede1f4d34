"""Plans of runs that sample, and of distillation: against real caches, steps and teachers."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel
from typer.testing import CliRunner

from families import VOCAB
from reply_runs import run_of as sampling_run_of
from tiny import tiny_bart, tiny_llama
from tunesmith import Run
from tunesmith.cli import app
from tunesmith.engine.distribution import Peers
from tunesmith.errors import SpecError
from tunesmith.jobs import least_recomputation
from tunesmith.jobs.assemble import assemble, attach_seeded
from tunesmith.jobs.least_recomputation import start_of
from tunesmith.jobs.plan import Plan, plan
from tunesmith.jobs.probe import probe, ready
from tunesmith.jobs.remedies import remedies
from tunesmith.jobs.roles import with_roles
from tunesmith.models.modes import evaluating
from tunesmith.rollout.decode import GrowingDecoder, Padded
from tunesmith.rollout.draw import Drawing
from tunesmith.rollout.fixed import FixedDecoder
from tunesmith.spec import validate

CPU = torch.device("cpu")
PROMPT, REPLY, ROWS = 40, 24, 12
"""Prompts of the length that data.max_length leaves beside the longest reply."""
REWARDS = [{"kind": "length", "free": 0, "limit": 4, "unit": "characters"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(hidden_size=64, intermediate_size=128).config.save_pretrained(folder)
    return folder


def settings_of(model: Path, objective: dict[str, Any], **changes: Any) -> dict[str, Any]:
    if objective["name"] in {"ppo", "grpo"}:
        rollout = {"replies": ROWS, "max_new_tokens": REPLY} | objective.get("rollout", {})
        objective = {"rewards": REWARDS, "epochs": 1, **objective, "rollout": rollout}
        if objective["name"] == "grpo":
            objective["samples"] = 4
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "method": {"name": "lora"},
        "objective": objective,
        "data": {"train": [{"path": "nowhere.jsonl"}], "max_length": PROMPT + REPLY},
        "train": {"batch_size": 4},
        "engine": {"speed": "safe", "checkpointing": "none"},
    } | changes


def run_of(model: Path, objective: dict[str, Any], **changes: Any) -> Run:
    return validate(settings_of(model, objective, **changes), source="test", lines={})


def distilling(model: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "distillation",
        "teacher": {"name": str(model), "dtype": "float32"},
        **more,
    }


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.parametrize("decoding", ["growing", "fixed"])
def test_the_cache_of_a_plan_is_that_of_a_real_roll_out(
    name: str, decoding: str, model: Path
) -> None:
    run = run_of(model, {"name": name, "rollout": {"decoding": decoding}})
    planned = plan(run, device="cpu").alone
    tuned = with_roles(attach_seeded(tiny_llama(hidden_size=64, intermediate_size=128), run), run)
    assert planned.cache == cache_of(tuned.model, fixed=decoding == "fixed")


@torch.no_grad()
def cache_of(model: PreTrainedModel, *, fixed: bool) -> int:
    """Bytes that the last step of a real roll-out has of keys and values."""
    prompts = Padded([[5] * PROMPT] * ROWS, range(ROWS), pad_token_id=0, device=CPU)
    with evaluating(model):
        decoder: GrowingDecoder | FixedDecoder = (
            FixedDecoder(model, Drawing(), prompts, room=REPLY, graphs=False)
            if fixed
            else GrowingDecoder(model, Drawing(), prompts)
        )
        for _ in range(REPLY - 1):
            decoder.advance()
    return sum(tensor.untyped_storage().nbytes() for tensor in decoder.keys_and_values())


@pytest.mark.parametrize(
    "objective",
    [{"name": "ppo"}, {"name": "ppo", "value": "adapter"}, {"name": "grpo", "kl": 0.1}],
    ids=["ppo", "ppo of two adapters", "grpo"],
)
def test_a_step_of_replies_leaves_what_a_real_step_leaves(
    objective: dict[str, Any], model: Path
) -> None:
    run = run_of(model, objective)
    length = PROMPT + REPLY
    with ready(run, CPU, real_weights=False) as stage:
        left, _ = stage.measured(4, length)
    assert plan(run, device="cpu").alone.activations == pytest.approx(left, rel=0.07)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"logits": "cached", "top_k": 4},
        {"logits": "cached", "top_k": VOCAB, "divergence": "js"},
    ],
    ids=["live", "cached", "cached whole"],
)
def test_a_step_of_distillation_leaves_what_a_real_step_leaves(
    more: dict[str, Any], model: Path
) -> None:
    run = run_of(model, distilling(model, **more))
    with ready(run, CPU, real_weights=False) as stage:
        left, _ = stage.measured(4, PROMPT + REPLY)
    assert plan(run, device="cpu").alone.activations == pytest.approx(left, rel=0.07)


def test_a_teacher_that_is_there_is_planned_whole_on_every_device(model: Path) -> None:
    alone = tiny_llama(hidden_size=64, intermediate_size=128)
    weights = sum(p.nbytes for p in alone.parameters())
    live, cached = (
        plan(run_of(model, distilling(model, **more)), device="cuda")
        for more in ({}, {"logits": "cached"})
    )
    assert live.alone.beside == pytest.approx(weights, rel=0.01)
    assert live.teacher_bytes == live.alone.beside
    assert live.on(8, "zero3").beside == live.alone.beside
    assert (cached.alone.beside, cached.teacher_bytes) == (0, 0)
    assert live.alone.frozen == pytest.approx(cached.alone.frozen, rel=0.01)


def test_a_teachers_codes_take_the_place_of_its_weights(model: Path) -> None:
    teacher = {"name": str(model), "dtype": "float32", "quantize": "nf4"}
    coded = plan(run_of(model, distilling(model) | {"teacher": teacher}), device="cuda")
    plain = plan(run_of(model, distilling(model)), device="cuda")
    assert coded.teacher_bytes < 0.6 * plain.teacher_bytes


def test_replies_of_the_student_are_planned_too(model: Path) -> None:
    settings = {"max_new_tokens": REPLY}
    run = run_of(model, distilling(model, on_policy=0.5, sampling=settings))
    planned = plan(run, device="cuda")
    assert planned.writing is not None
    assert planned.writing.rows() == 4  # those of a step
    assert planned.alone.cache > 0
    assert planned.alone.phases.keys() == {"training step", "roll-out"}


def planned_with(model: Path, rows: int, **changes: Any) -> Plan:
    rollout = {"replies": rows, "batch_size": rows}
    return plan(run_of(model, {"name": "ppo", "rollout": rollout}, **changes), device="cuda")


def test_the_most_is_that_of_one_phase_and_the_phase_depends_on_the_rows(model: Path) -> None:
    few, many = planned_with(model, 4).alone, planned_with(model, 256).alone
    assert (few.peaks_in, many.peaks_in) == ("training step", "roll-out")
    assert many.cache == 64 * few.cache
    for memory in (few, many):
        assert memory.peak == max(memory.phases.values()) < sum(memory.phases.values())
    assert many.phases["training step"] == few.phases["training step"]


def test_devices_share_the_replies_of_a_roll_out(model: Path) -> None:
    planned = planned_with(model, 64)
    assert planned.on(4, "ddp").cache == planned.alone.cache // 4
    assert planned.on(4, "ddp").activations == planned.alone.activations
    many = run_of(model, {"name": "ppo", "rollout": {"replies": 64, "batch_size": 8}})
    assert plan(many, device="cuda").on(4, "ddp").cache == planned.alone.cache // 8


def test_fewer_replies_at_once_make_a_run_fit(model: Path) -> None:
    planned = planned_with(model, 64)
    limit = planned.alone.peak - planned.alone.cache // 3
    found = remedies(planned, limit)
    assert [remedy.change for remedy in found] == ["objective.rollout.batch_size halved"]
    assert found[0].peak <= limit
    assert found[0].planned.writing is not None
    assert found[0].planned.writing.rows() == 32


def test_both_phases_are_made_to_fit(model: Path) -> None:
    planned = planned_with(model, 16, train={"batch_size": 8})
    step, roll_out = (planned.alone.phases[name] for name in ("training step", "roll-out"))
    limit = int(0.7 * min(step, roll_out))
    found = remedies(planned, limit)
    assert found[-1].peak <= limit
    changed = {remedy.change for remedy in found}
    assert "objective.rollout.batch_size halved" in changed
    assert any("checkpointing" in change or "train.batch_size" in change for change in changed)


def test_no_remedy_recomputes_blocks_that_two_adapters_act_on(model: Path) -> None:
    planned = plan(run_of(model, {"name": "ppo", "value": "adapter"}), device="cuda")
    found = remedies(planned, int(0.75 * planned.alone.peak))
    assert found
    assert not any("checkpointing" in remedy.change for remedy in found)


def test_reward_runs_that_are_not_there_yet_are_guessed_and_told(
    model: Path, tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing")
    plain = planned_with(model, ROWS)
    with_reward = {"name": "ppo", "rewards": [{"kind": "run", "path": missing}]}
    adapter = plan(run_of(model, with_reward), device="cuda")
    assert adapter.alone.frozen - plain.alone.frozen >= 4 * plain.counts.trainable * 0.99
    assert "no run is there yet" in adapter.remarks[0]
    named = {"kind": "run", "path": missing, "wanted": "good"}
    classifier = plan(run_of(model, {"name": "ppo", "rewards": [named]}), device="cuda")
    assert classifier.alone.beside == pytest.approx(4 * plain.counts.base, rel=0.01)
    assert "a classifier as large as" in classifier.remarks[0]


def test_a_reward_run_that_is_there_has_its_own_adapter(model: Path, tmp_path: Path) -> None:
    reward = settings_of(model, {"name": "reward"}, method={"name": "lora", "rank": 32})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(reward))
    plain = planned_with(model, ROWS)
    with_reward = {"name": "ppo", "rewards": [{"kind": "run", "path": str(tmp_path)}]}
    planned = plan(run_of(model, with_reward), device="cuda")
    more = planned.alone.frozen - plain.alone.frozen
    rank = run_of(model, {"name": "sft"}).methods[0].rank  # type: ignore[union-attr]
    value_head = 65
    assert more == pytest.approx(4 * (plain.counts.trainable - value_head) * 32 / rank, rel=0.05)
    assert planned.remarks == ()
    assert planned.counts == plain.counts


def test_what_cannot_be_sampled_from_is_refused_by_its_name(model: Path, tmp_path: Path) -> None:
    tiny_bart().config.save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"objective.name: ppo samples from a causal model"):
        plan(run_of(tmp_path, {"name": "ppo"}))
    with pytest.raises(SpecError, match="no room for a prompt"):
        plan(run_of(model, {"name": "grpo", "rollout": {"max_new_tokens": PROMPT + REPLY}}))
    with pytest.raises(SpecError, match=r"--probe: a step of objective.name: ppo"):
        probe(plan(run_of(model, {"name": "ppo"}), device="cpu"))


def test_more_tokens_of_a_teacher_than_there_are_are_refused_by_their_name(model: Path) -> None:
    with pytest.raises(SpecError, match=r"objective.top_k: 5,000 tokens are more than the 300 "):
        plan(run_of(model, distilling(model, logits="cached", top_k=5000)))


def test_the_command_names_the_phase_and_shows_the_cache(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings_of(model, {"name": "grpo"})))
    done = CliRunner().invoke(app, ["plan", str(file), "--devices", "1,2"])
    assert done.exit_code == 0, done.output
    assert "cache" in done.output
    assert "The most is that of the " in done.output
    assert f"writes {ROWS} replies of {REPLY} tokens at once to prompts of {PROMPT}" in done.output
    assert "zero2" in done.output
    assert "zero3" not in done.output


def test_the_least_recomputation_of_a_run_that_samples_is_planned(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembled = assemble(sampling_run_of(tmp_path, tiny_model), Peers(CPU), lambda line: None)
    monkeypatch.setattr(least_recomputation, "room_on", lambda device: 2**31)
    start = start_of(assembled, Peers(CPU))
    assert start is not None
    assert start.reason.startswith("planned at ")
    assert start.level.mode is None


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_what_is_measured_against_these_plans_still_runs(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    measured_replies = importlib.import_module("plan_replies").measured_replies
    assert measured_replies(run_of(model, {"name": name}), CPU) > 0
