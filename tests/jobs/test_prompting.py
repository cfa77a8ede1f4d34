"""Untrained decoders asked with and without examples: what they read, what is judged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tiny import tiny_tokenizer
from tunesmith.data.prepare import prepare
from tunesmith.data.render import Renderer
from tunesmith.data.shots import choose_examples, with_examples
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.prompting import ask
from tunesmith.jobs.prompting_spec import PromptingRun, PromptingSettings
from tunesmith.spec import Run, validate


def rows() -> list[dict[str, str]]:
    return [
        {"prompt": f"Say {n}", "completion": "yes" * (1 + n % 3), "system": f"Be {n}."}
        for n in range(20)
    ]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    return run_of(tmp_path, tiny_model)


def run_of(folder: Path, model: Path, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "name": "asked",
        "output": str(folder / "runs"),
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "holdout": 6, "max_length": 128},
        "evaluation": {"metrics": ["bleu", "accuracy"], "choices": ["yes", "yesyes"],
                       "max_new_tokens": 3, "samples": 1},
        "engine": {"device": "cpu"},
    }  # fmt: skip
    for section, settings in changes.items():
        values[section] = values[section] | settings
    return validate(values, source="test", lines={})


def asked(run: Run, shots: int, **changes: Any) -> dict[str, Any]:
    job = PromptingRun(run.model_copy(update=changes), PromptingSettings(shots=shots))
    return ask(job, lambda line: None, overwrite=True)  # type: ignore[return-value]


def test_no_shots_is_the_untuned_model(run: Run) -> None:
    summary = asked(run, 0)
    trained = tunesmith.train(run.model_copy(update={"name": "trained"})).summary
    assert summary["after"] == pytest.approx(trained["before"], rel=1e-6)
    assert summary["prompting"] == {"shots": 0, "tokens_added": 0.0}
    assert summary["trainable_parameters"] == summary["result_bytes"] == summary["steps"] == 0


def test_examples_change_what_is_measured_and_their_seed_decides_them(run: Run) -> None:
    none, two = asked(run, 0), asked(run, 2)
    assert two["after"]["loss"] != none["after"]["loss"]
    assert two["prompting"]["tokens_added"] > 20
    assert asked(run, 2)["after"] == two["after"]
    assert asked(run, 2, seed=1)["after"]["loss"] != two["after"]["loss"]


def test_everything_of_the_row_is_kept_for_intervals(run: Run) -> None:
    asked(run, 1)
    directory = run.directory
    outcomes = json.loads((directory / "outcomes.json").read_text())
    loss = outcomes["loss"]
    assert len(loss["totals"]) == len(loss["counts"]) == len(outcomes["replies"]) == 6
    after = json.loads((directory / "summary.json").read_text())["after"]
    assert sum(loss["totals"]) / sum(loss["counts"]) == pytest.approx(after["loss"], rel=1e-5)
    assert "prompting" in (directory / "report.html").read_text()


def test_the_loss_with_examples_is_that_of_the_reply_alone(run: Run) -> None:
    asked(run, 2)
    outcomes = json.loads((run.directory / "outcomes.json").read_text())["loss"]
    loaded = tunesmith.load_model(run.model.name, dtype=torch.float32)
    tokenizer = tiny_tokenizer()
    data = prepare(run.data, tokenizer, seed=0, cache=run.directory / "tokens")
    examples = choose_examples(run.data, data.examples, count=2, seed=run.seed)
    prompt = data.examples[0]
    assert prompt is not None
    turns = [turn for example in examples for turn in example.messages]
    system, question = prompt.messages
    before = [system, *turns, question]
    ids = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
    reply = tokenizer(prompt.reference[0] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids + reply])).logits[0, len(ids) - 1 : -1].double()
    nats = -logits.log_softmax(-1)[range(len(reply)), reply].sum()
    assert outcomes["totals"][0] == pytest.approx(nats.item(), rel=1e-4)
    assert outcomes["counts"][0] == len(reply)


def test_no_example_asks_what_the_evaluation_asks(run: Run) -> None:
    data = prepare(run.data, tiny_tokenizer(), seed=0, cache=run.directory / "tokens")
    examples = choose_examples(run.data, data.examples, count=14, seed=0)  # all that train
    held = {p.messages[-1]["content"] for p in data.examples if p}
    assert len(held) == 6
    assert held.isdisjoint(example.messages[0]["content"] for example in examples)
    assert all(turn["role"] != "system" for example in examples for turn in example.messages)
    with pytest.raises(DataError, match=r"prompting\.shots: 15 examples .* 14 training rows"):
        choose_examples(run.data, data.examples, count=15, seed=0)


def test_examples_stand_behind_the_system_turn(run: Run) -> None:
    tokenizer = tiny_tokenizer()
    data = prepare(run.data, tokenizer, seed=0, cache=run.directory / "tokens")
    example = choose_examples(run.data, data.examples, count=1, seed=0)[0]
    prompt = data.examples[0]
    assert prompt is not None
    row, longer = with_examples(prompt, [example], Renderer(tokenizer))
    text = tokenizer.decode(longer.input_ids)
    contents = [m["content"] for m in (prompt.messages[0], *example.messages, prompt.messages[1])]
    places = [text.index(str(content)) for content in contents]
    assert places == sorted(places)
    said = tokenizer.decode(row.input_ids[row.supervised])
    assert said == prompt.reference[0] + "<|im_end|>"


def test_a_prompt_that_does_not_fit_is_named_with_its_lengths(run: Run) -> None:
    message = r"prompting\.shots: 9: the longest prompt has \d+ tokens .* holds 256; use fewer"
    with pytest.raises(DataError, match=message):
        asked(run, 9)
    assert not run.directory.exists()


def test_what_cannot_be_asked_is_refused(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    labelled = run_of(tmp_path, tiny_model).model_copy(
        update={"objective": tunesmith.Classification()}
    )
    with pytest.raises(SpecError, match="asks a decoder for replies, and this is the objective"):
        asked(labelled, 0)
    with pytest.raises(SpecError, match=r"data\.supervise: all"):
        asked(run_of(tmp_path, tiny_model, data={"supervise": "all"}), 1)
