"""Whole runs that learn from judged replies: reward models, preferences, what stands on them."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import tunesmith
from pairs import pair_rows, run_of, write_rows
from reply_runs import run_of as replies_of
from tiny import CHATML, VOCAB, tiny_llama, tiny_tokenizer
from tunesmith import (
    DataSettings,
    EvaluationSettings,
    LoRA,
    ModelSettings,
    Source,
    TrainSettings,
)
from tunesmith.engine.distribution import connect
from tunesmith.errors import AdapterError, SpecError
from tunesmith.jobs.assemble import assemble
from tunesmith.jobs.base import base_name, load_base
from tunesmith.jobs.predict import predict, predict_file
from tunesmith.jobs.reward_roles import open_run_beside
from tunesmith.jobs.reward_runs import open_reward_run
from tunesmith.jobs.train import Result
from tunesmith.methods.roles import RewardScorer, acting
from tunesmith.objectives import Distillation, Preference, Reward
from tunesmith.rewards.contract import Scored
from tunesmith.rewards.run import RunReward

CPU = torch.device("cpu")
TEXTS = [
    "<|im_start|>user\nabc?<|im_end|>\n<|im_start|>assistant\nyes!!<|im_end|>",
    "<|im_start|>user\nabc?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>",
]


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Result:
    folder = tmp_path_factory.mktemp("reward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        return tunesmith.train(run_of(folder, tiny_model, Reward(centering=0.01), name="reward"))


def test_a_reward_run_learns_and_tells_what_its_rewards_are_made_of(reward_run: Result) -> None:
    before, after = reward_run.summary["before"], reward_run.summary["after"]
    assert after["accuracy"] >= before["accuracy"]
    assert after["loss"] < before["loss"]
    assert {"length_correlation", "calibration_error", "length_only_accuracy"} <= set(after)
    written = json.loads(reward_run.directory.summary.read_text())
    assert sum(written["rewards"]["counts"]) == 32
    assert written["calibration"][0]["pairs"] > 0


def test_a_reward_head_is_not_started_anew_when_it_is_loaded(reward_run: Result) -> None:
    """Peers lose the head on saving: here a fresh model gives equal rewards, bit for bit."""
    loaded = tunesmith.load_run(reward_run.directory.path)
    batch = {
        "input_ids": torch.arange(3, 23).view(2, 10),
        "attention_mask": torch.ones(2, 10, dtype=torch.int64),
    }
    objective = reward_run.tuned and Reward()
    with torch.no_grad():
        trained = objective.rewards(reward_run.tuned.model, batch)
        again = objective.rewards(loaded.tuned.model, batch)
    assert torch.equal(trained, again)
    with torch.no_grad(), loaded.tuned.disabled():
        assert not torch.equal(objective.rewards(loaded.tuned.model, batch), trained)


def test_a_reward_run_predicts_a_number_for_each_reply(reward_run: Result, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "new.jsonl", pair_rows(2, seed=5))
    found = predict_file(reward_run.directory.path, rows)
    assert [one.text[:2] for one in found] == ["ye", "no", "ye", "no"]
    row = pair_rows(1, seed=5)[0]
    text = f"Human: {row['prompt']}\n\nAssistant: {row['chosen']}"
    assert predict(reward_run.directory.path, [text])[0].said == found[0].said


def policy(model: Path) -> tunesmith.TunedModel:
    base = load_base(ModelSettings(name=str(model)), device=CPU, dtype=torch.float32)
    return tunesmith.attach(base, LoRA(rank=2))


def test_a_scorer_beside_a_policy_gives_the_reward_runs_rewards(
    reward_run: Result, tiny_model: Path
) -> None:
    tuned = policy(tiny_model)
    tokenizer = tunesmith.load_model(str(tiny_model)).tokenizer
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        before = tuned.model(ids).logits
    scorer = RewardScorer(tuned, reward_run.directory.adapter, tokenizer)
    with torch.no_grad():
        assert torch.equal(tuned.model(ids).logits, before)
    found = scorer.score(TEXTS)
    by_ids = scorer.score([tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS])
    assert found == by_ids
    loaded = tunesmith.load_run(reward_run.directory.path)
    for text, reward in zip(TEXTS, found, strict=True):
        alone = {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}
        with torch.no_grad():
            expected = Reward().rewards(loaded.tuned.model, alone)
        assert reward == pytest.approx(expected.item(), abs=1e-5)
    assert set(tuned.trainable()) == {n for n in tuned.trainable() if "lora_default" in n}
    with acting(tuned), torch.no_grad():
        off = tuned.model(ids).logits
    with tuned.disabled(), torch.no_grad():
        assert torch.equal(tuned.model(ids).logits, off)


def test_a_reward_run_says_the_same_beside_a_policy_as_alone(
    reward_run: Result, tiny_model: Path, tmp_path: Path
) -> None:
    """Beside it too the reward is read at the end-of-turn, not at the line break behind it."""
    run = replies_of(tmp_path, tiny_model)
    assembled = assemble(run, connect(run.engine), lambda _: None)
    asked = RunReward(path=str(reward_run.directory.path))
    rows = [Scored("abc?", reply, {}) for reply in ("yes!!", "no", "")]
    beside = open_run_beside(assembled)(asked)(rows)
    assert beside == pytest.approx(open_reward_run(asked)(rows), abs=1e-5)
    scorer = RewardScorer(policy(tiny_model), reward_run.directory.adapter, assembled.tokenizer)
    empty = TEXTS[0].replace("yes!!", "")
    assert beside == pytest.approx(scorer.score([*TEXTS, empty]), abs=1e-5)


def test_a_reward_run_of_whole_weights_is_refused_beside_a_policy(
    reward_run: Result, tiny_model: Path, tmp_path: Path
) -> None:
    run = replies_of(tmp_path, tiny_model)
    assembled = assemble(run, connect(run.engine), lambda _: None)
    whole = tmp_path / "whole"
    shutil.copytree(reward_run.directory.path, whole)
    (whole / "adapter").rename(whole / "model")
    with pytest.raises(SpecError, match=r"whole: this reward run tuned whole weights"):
        open_run_beside(assembled)(RunReward(path=str(whole)))


def test_a_reward_run_of_another_base_or_template_is_refused_with_both_names(
    reward_run: Result, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = tunesmith.load_model(str(tiny_model)).tokenizer
    tuned = policy(tiny_model)
    tuned.model.config._name_or_path = tuned.model.name_or_path = "another-base"
    with pytest.raises(AdapterError, match=r"tiny-llama.*another-base"):
        RewardScorer(tuned, reward_run.directory.adapter, tokenizer)
    tokenizer.chat_template = CHATML + "{# other #}"
    with pytest.raises(AdapterError, match=r"another chat template \(.*than.*# other #"):
        RewardScorer(policy(tiny_model), reward_run.directory.adapter, tokenizer)


def test_preferences_start_from_the_adapter_of_an_earlier_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    first = tunesmith.train(run_of(tmp_path, tiny_model, Preference(loss="orpo"), name="first"))
    model = ModelSettings(name=str(tiny_model), dtype="float32", adapter=str(first.directory.path))
    run = run_of(tmp_path, tiny_model, Preference(), name="second", model=model)
    second = tunesmith.train(run)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad(), second.tuned.disabled():
        base = second.tuned.model(ids).logits
    with torch.no_grad():
        continued = first.tuned.model(ids).logits
        torch.testing.assert_close(base, continued, atol=1e-5, rtol=1e-4)
        result = second.tuned.model(ids).logits
        assert torch.equal(
            tunesmith.load_run(second.directory.path).tuned.model(ids).logits, result
        )
    names = [p["name"] for p in second.summary["proofs"]]
    assert "policy starts at the reference" in names
    plain = load_base(ModelSettings(name=str(tiny_model)), device=CPU, dtype=torch.float32)
    with pytest.raises(AdapterError, match="was made on the base model"):
        tunesmith.load_adapter(plain, second.directory.adapter)
    assert base_name(model).startswith(f"{tiny_model}+first-")


def test_cached_and_live_references_train_the_same_weights(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    found = []
    for name, reference in (("cached", "cached"), ("again", "cached"), ("live", "live")):
        run = run_of(tmp_path, tiny_model, Preference(reference=reference), name=name)
        found.append(tunesmith.train(run).tuned.state_dict())
    assert len(list((tmp_path / "cache" / "reference").glob("*.safetensors"))) == 1
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[2][name], atol=1e-4, rtol=1e-3)


def test_kto_learns_the_same_however_a_batch_is_split(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    # Only good rows, so that all replies become likelier and z0 is soon above 0.
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
        for row in pair_rows(24)
    ]
    file = write_rows(tmp_path / "labelled.jsonl", rows)
    data = DataSettings(train=[Source(path=str(file))], max_length=128)
    found = []
    for batch_size in (4, 1):
        train = TrainSettings(
            max_steps=3,
            batch_size=batch_size,
            accumulation_steps=4 // batch_size,
            learning_rate=2e-2,
        )
        changes = {"name": f"of-{batch_size}", "train": train, "data": data}
        run = run_of(tmp_path, tiny_model, Preference(loss="kto"), **changes)
        result = tunesmith.train(run)
        lines = (result.directory.path / "metrics.jsonl").read_text().splitlines()
        steps = [event for event in map(json.loads, lines) if event["event"] == "step_done"]
        found.append([(step["loss"], step["metrics"]["kl"]) for step in steps])
    assert any(kl > 0 for _, kl in found[0])  # else every split would have the same z0
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_preferences_can_tell_what_they_forget_of_general_text(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    evaluation = EvaluationSettings(samples=0, general="bundled")
    run = run_of(tmp_path, tiny_model, Preference(loss=loss), evaluation=evaluation)
    summary = tunesmith.train(run).directory.summary
    written = json.loads(summary.read_text())["general_loss"]
    assert written["before"] == pytest.approx(math.log(VOCAB), rel=0.1)  # a random model's
    assert written["after"] != written["before"]


def test_an_adapter_that_is_not_there_is_named(tmp_path: Path, tiny_model: Path) -> None:
    settings = ModelSettings(name=str(tiny_model), adapter=str(tmp_path))
    with pytest.raises(SpecError, match=r"model\.adapter"):
        load_base(settings, device=CPU, dtype=torch.float32)


def test_a_student_learns_its_teachers_distribution(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(5)
    tiny_llama(hidden_size=48, initializer_range=0.2).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    objective = Distillation(
        teacher=ModelSettings(name=str(tmp_path / "teacher"), dtype="float32"), label_weight=0.1
    )
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(48)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = DataSettings(train=[Source(path=str(path))], holdout=8, max_length=128)
    result = tunesmith.train(run_of(tmp_path, tiny_model, objective, data=data))
    before, after = result.summary["before"], result.summary["after"]
    assert 0 < after["divergence"] < before["divergence"]


@pytest.mark.parametrize("kind", ["scores", "steps"])
def test_outcome_and_process_rewards_train(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "score": len(row["chosen"]) / 4}
        if kind == "scores"
        else {"prompt": row["prompt"], "completions": ["yes", "no"], "labels": [True, False]}
        for row in pair_rows(48)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = DataSettings(train=[Source(path=str(path))], holdout=8, max_length=128)
    result = tunesmith.train(run_of(tmp_path, tiny_model, Reward(kind=kind), data=data))
    assert result.summary["after"]["loss"] < result.summary["before"]["loss"]


def test_rows_whose_steps_are_all_cut_off_add_nothing_to_a_process_reward(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "prompt": row["prompt"],
            "completions": ["yes" * (200 if number % 2 else 1), "no"],
            "labels": [True, False],
        }
        for number, row in enumerate(pair_rows(16))
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = DataSettings(train=[Source(path=str(path))], holdout=8, max_length=128)
    run = run_of(tmp_path, tiny_model, Reward(kind="steps"), data=data)
    train = run.train.model_copy(
        update={"batch_size": 1, "accumulation_steps": 4, "epochs": 1, "max_steps": None}
    )
    result = tunesmith.train(run.model_copy(update={"train": train}))
    counts = json.loads(result.directory.outcomes.read_text(encoding="utf-8"))["loss"]["counts"]
    assert 0 in counts
    assert 2 in counts
    assert result.outcome.steps == 2
    assert math.isfinite(result.summary["after"]["loss"])
