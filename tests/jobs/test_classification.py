"""Whole runs of tiny classifiers: they learn, are saved, load again, and go on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import tunesmith
from classifiers import CONFIGS, marked_rows, save_base, write_rows
from tunesmith import (
    SFT,
    Adapter,
    BitFit,
    Classification,
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    Full,
    Head,
    LastLayer,
    LoRA,
    ModelSettings,
    PrefixTuning,
    PromptTuning,
    Run,
    Source,
    TokenClassification,
    TrainSettings,
)
from tunesmith.cli import main
from tunesmith.engine.settings import CheckpointSettings
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.comparison_statistics import statistic_of
from tunesmith.jobs.evaluate import evaluate
from tunesmith.jobs.merge import merge
from tunesmith.jobs.predict import predict, predict_file
from tunesmith.methods.contract import Method

METHODS: dict[str, tuple[Method, float]] = {
    "lora": (LoRA(rank=4), 2e-2),
    "full": (Full(), 5e-3),
    "head": (LastLayer(blocks=0, norm=False, head=True), 5e-2),
    "bitfit": (BitFit(add_missing=True), 3e-2),
    "prefix_tuning": (PrefixTuning(length=4), 3e-2),
    "prompt_tuning": (PromptTuning(tokens=4), 3e-2),
    "adapter": (Adapter(), 2e-2),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one base of each family."""
    folder = tmp_path_factory.mktemp("bases")
    for family in CONFIGS:
        save_base(folder / family, family)
    return folder


def run_of(folder: Path, base: Path, **changes: object) -> Run:
    """A run over marked rows."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, marked_rows(200))
    settings: dict[str, object] = {
        "name": "job",
        "output": str(folder / "runs"),
        "model": ModelSettings(name=str(base), dtype="float32"),
        "method": LoRA(rank=4),
        "objective": Classification(),
        "data": DataSettings(train=[Source(path=str(rows))], holdout=40, max_length=64),
        "train": TrainSettings(max_steps=60, batch_size=16, learning_rate=2e-2),
        "evaluation": EvaluationSettings(samples=2, batch_size=16),
        "engine": EngineSettings(device="cpu"),
    }
    return Run(**(settings | changes))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_is_saved_and_loads_again(
    tmp_path: Path, bases: Path, family: str, method: str
) -> None:
    kind, rate = METHODS[method]
    run = run_of(
        tmp_path,
        bases / family,
        method=kind,
        train=TrainSettings(max_steps=110, batch_size=16, learning_rate=rate),
    )
    result = tunesmith.train(run)
    assert result.summary["after"]["accuracy"] > 0.9
    loaded = tunesmith.load_run(result.directory.path)
    trained = result.tuned.state_dict()
    again = loaded.tuned.state_dict()
    heads = result.tuned.sites.classifier
    assert any(name.startswith(heads) for name in trained)
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    ids = {"input_ids": torch.tensor([[1, 40, 41, 42, 43, 7]])}
    result.tuned.model.eval()
    with torch.no_grad():
        before = run.objective.logits(result.tuned.model, ids)
        assert torch.equal(before, run.objective.logits(loaded.tuned.model, ids))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_interrupted_run_resumes_to_the_same_weights(
    tmp_path: Path, bases: Path, family: str
) -> None:
    checkpoint = CheckpointSettings(every_steps=2)
    short = TrainSettings(max_steps=6, batch_size=4, learning_rate=1e-2)
    settings = {"checkpoint": checkpoint, "train": short}
    whole = tunesmith.train(run_of(tmp_path, bases / family, name="whole", **settings))
    run = run_of(tmp_path, bases / family, **settings)

    class InterruptedRunError(RuntimeError):
        pass

    def interrupt(event: object) -> None:
        if getattr(event, "kind", "") == "step_done" and event.step == 5:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        tunesmith.train(run, listeners=[interrupt])
    resumed = tunesmith.train(run, resume=True)
    one, other = weights(whole.directory.path), weights(resumed.directory.path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("class_weights", ["none", "balanced", {"marked": 0.2}])
def test_accumulation_gives_the_gradients_of_one_batch(
    tmp_path: Path, bases: Path, family: str, class_weights: object
) -> None:
    objective = Classification(class_weights=class_weights)
    rows = [row | {"text": row["text"] * (1 + n % 3)} for n, row in enumerate(marked_rows(12))]
    write_rows(tmp_path / "rows.jsonl", [*rows, *(r for r in rows if r["label"] == "plain")])
    found = []
    for name, size, accumulated in (("one", 8, 1), ("four", 2, 4), ("eight", 1, 8)):
        train = TrainSettings(
            max_steps=2, batch_size=size, accumulation_steps=accumulated, learning_rate=1e-2
        )
        data = DataSettings(train=[Source(path=str(tmp_path / "rows.jsonl"))], max_length=64)
        run = run_of(
            tmp_path, bases / family, name=name, objective=objective, train=train, data=data
        )
        found.append(steps(tunesmith.train(run).directory.path))
    # A step's first loss and norm come of equal weights, so they differ by rounding alone.
    for key in ("loss", "grad_norm"):
        first = [events[0][key] for events in found]
        assert first == pytest.approx([first[0]] * 3, rel=1e-5)


def steps(directory: Path) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "step_done"]


def test_labels_are_recorded_in_run_and_model(tmp_path: Path, bases: Path) -> None:
    short = TrainSettings(max_steps=1, batch_size=4)
    result = tunesmith.train(run_of(tmp_path, bases / "bert", method=Full(), train=short))
    config = json.loads((result.directory.model / "config.json").read_text())
    assert config["id2label"] == {"0": "marked", "1": "plain"}
    assert config["label2id"] == {"marked": 0, "plain": 1}
    assert config["problem_type"] == "single_label_classification"
    assert "- marked\n  - plain" in result.directory.spec.read_text()


def test_the_evidence_holds_intervals_scores_and_a_confusion_matrix(
    tmp_path: Path, bases: Path
) -> None:
    result = tunesmith.train(run_of(tmp_path, bases / "bert"))
    summary = json.loads(result.directory.summary.read_text())
    low, high = summary["intervals"]["accuracy"]
    assert low <= summary["after"]["accuracy"] <= high + 1e-9
    matrix = torch.tensor(summary["confusion"]["matrix"])
    assert matrix.sum() == 40
    assert matrix.diag().sum() / 40 == pytest.approx(summary["after"]["accuracy"])
    outcomes = json.loads(result.directory.outcomes.read_text())
    assert sum(outcomes["accuracy"]) / 40 == pytest.approx(summary["after"]["accuracy"])
    assert "Confusion" in result.directory.report.read_text()


def test_eval_of_a_run_repeats_its_numbers(tmp_path: Path, bases: Path) -> None:
    result = tunesmith.train(run_of(tmp_path, bases / "llama"))
    metrics = tunesmith.evaluate(result.directory.path)
    assert metrics["tuned"] == pytest.approx(result.summary["after"])
    assert metrics["base"] == pytest.approx(result.summary["before"])


def test_the_best_step_by_a_metric_is_taken(tmp_path: Path, bases: Path) -> None:
    run = run_of(
        tmp_path,
        bases / "bert",
        evaluation=EvaluationSettings(every_steps=10, best="macro_f1"),
        train=TrainSettings(max_steps=60, batch_size=16, learning_rate=2e-2, early_stopping=2),
    )
    result = tunesmith.train(run)
    assert result.outcome.best.metric == "macro_f1"


def test_a_regression_learns_a_number(tmp_path: Path, bases: Path) -> None:
    rows = [row | {"label": float(row["text"].count("#")) / 3} for row in marked_rows(200)]
    write_rows(tmp_path / "rows.jsonl", rows)
    run = run_of(
        tmp_path,
        bases / "bert",
        objective=Classification(kind="regression"),
        train=TrainSettings(max_steps=120, batch_size=16, learning_rate=2e-2),
    )
    result = tunesmith.train(run)
    assert result.summary["after"]["spearman"] > 0.8
    assert result.summary["after"]["pearson"] > 0.8
    assert result.summary["after"]["mse"] < result.summary["before"]["mse"]
    loaded = tunesmith.load_run(result.directory.path)
    assert loaded.tuned.model.config.num_labels == 1


def test_several_labels_are_learned_with_a_threshold(tmp_path: Path, bases: Path) -> None:
    rows = [
        row | {"label": [sign for sign in "ab#" if sign in row["text"]]} for row in marked_rows(240)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    run = run_of(
        tmp_path,
        bases / "bert",
        objective=Classification(kind="multi"),
        train=TrainSettings(max_steps=150, batch_size=16, learning_rate=2e-2),
    )
    after = tunesmith.train(run).summary["after"]
    assert after["micro_f1"] > 0.85
    assert after["best_micro_f1"] >= after["micro_f1"]
    assert 0 < after["threshold"] < 1


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "gpt2"])
def test_labels_of_words_are_learned_and_load_again(
    tmp_path: Path, bases: Path, family: str
) -> None:
    rows = []
    for row in marked_rows(120):
        words = [row["text"][i : i + 2] for i in range(0, len(row["text"]), 2)]
        rows.append({"tokens": words, "tags": ["M" if word[0] == "#" else "O" for word in words]})
    write_rows(tmp_path / "rows.jsonl", rows)
    run = run_of(tmp_path, bases / family, objective=TokenClassification())
    result = tunesmith.train(run)
    assert result.summary["after"]["accuracy"] > 0.95
    assert result.summary["after"]["macro_f1"] > 0.95
    metrics = tunesmith.evaluate(result.directory.path, base=False)
    assert metrics["tuned"] == pytest.approx(result.summary["after"])


def test_entities_are_scored_where_tags_mark_them(tmp_path: Path, bases: Path) -> None:
    rows = []
    for row in marked_rows(120):
        words = [row["text"][i : i + 1] for i in range(0, len(row["text"]), 2)]
        before = ["", *words]
        tags = [
            "O" if word != "#" else "I-M" if before[place] == "#" else "B-M"
            for place, word in enumerate(words)
        ]
        rows.append({"tokens": words, "tags": tags})
    write_rows(tmp_path / "rows.jsonl", rows)
    run = run_of(tmp_path, bases / "bert", objective=TokenClassification())
    result = tunesmith.train(run)
    after = result.summary["after"]
    assert {"entity_f1", "entity_precision", "entity_recall"} <= set(after)
    outcomes = json.loads(result.directory.outcomes.read_text())
    for metric in ("entity_f1", "entity_precision", "entity_recall", "accuracy", "loss"):
        kept = outcomes[metric]
        assert sum(kept["totals"]) / sum(kept["counts"]) == pytest.approx(after[metric], rel=1e-5)
    assert after["entity_f1"] > 0.5


KINDS = {
    "single": Classification(class_weights={"marked": 3.0}),
    "multi": Classification(kind="multi"),
    "regression": Classification(kind="regression"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_of_rows_gives_the_metrics(tmp_path: Path, bases: Path, kind: str) -> None:
    rows: list[dict[str, object]] = []
    for row in marked_rows(60):
        marked = row["label"] == "marked"
        labels = {"single": row["label"], "multi": ["x", "m"] if marked else ["x"]}
        rows.append({"text": row["text"], "label": labels.get(kind, float(marked))})
    rows[1]["label"] = ["m"] if kind == "multi" else rows[1]["label"]
    write_rows(tmp_path / "rows.jsonl", rows)
    short = TrainSettings(max_steps=2, batch_size=8, learning_rate=1e-3)
    run = run_of(tmp_path, bases / "bert", objective=KINDS[kind], train=short)
    result = tunesmith.train(run)
    outcomes = json.loads(result.directory.outcomes.read_text())
    after = result.summary["after"]
    known = {name for name in after if statistic_of(outcomes, name)}
    assert known == set(after) - {"threshold", "best_micro_f1"}
    for name in known:
        found = statistic_of(outcomes, name)
        assert found is not None
        assert found.on(np.arange(found.rows)) == pytest.approx(after[name], rel=1e-5), name


@pytest.mark.parametrize("method", [LoRA(rank=4), Full()], ids=lambda m: m.name)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_merged_classifier_is_a_plain_directory(
    tmp_path: Path, bases: Path, family: str, method: Method
) -> None:
    result = tunesmith.train(run_of(tmp_path, bases / family, method=method))
    proofs = merge(result.directory.path, tmp_path / "merged")
    assert all(proof.passed for proof in proofs)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[1, 40, 41, 42, 43, 7]])
    with torch.no_grad():
        expected = plain(ids).logits
        ours = Classification().logits(result.tuned.model.eval(), {"input_ids": ids})
    torch.testing.assert_close(expected, ours, rtol=1e-4, atol=1e-4)
    assert plain.config.id2label == {0: "marked", 1: "plain"}


def test_a_bfloat16_base_gets_a_float32_head(tmp_path: Path, bases: Path) -> None:
    run = run_of(
        tmp_path,
        bases / "llama",
        model=ModelSettings(name=str(bases / "llama"), dtype="bfloat16"),
    )
    result = tunesmith.train(run)
    assert result.tuned.model.score.weight.dtype == torch.float32
    assert result.summary["after"]["accuracy"] > 0.9
    loaded = tunesmith.load_run(result.directory.path)
    assert torch.equal(loaded.tuned.model.score.weight, result.tuned.model.score.weight)
    assert all(proof["passed"] for proof in result.summary["proofs"])


def test_the_head_has_its_own_learning_rate(tmp_path: Path, bases: Path) -> None:
    short = TrainSettings(max_steps=1, batch_size=4, learning_rate=1e-3, warmup=0)
    still = run_of(
        tmp_path,
        bases / "bert",
        train=short,
        objective=Classification(head_learning_rate=1e-12),
    )
    result = tunesmith.train(still)
    start = tunesmith.load_model(
        str(bases / "bert"),
        head=Head("sequence_classification", ("marked", "plain")),
        dtype=torch.float32,
    ).model
    torch.testing.assert_close(
        result.tuned.model.classifier.weight, start.classifier.weight, rtol=0, atol=1e-9
    )


def test_predictions_are_those_of_the_evaluation(tmp_path: Path, bases: Path) -> None:
    result = tunesmith.train(run_of(tmp_path, bases / "gpt2"))
    texts = ["#a#b#c#d#e", "abcdefg"]
    predictions = predict(result.directory.path, texts)
    assert [p.said for p in predictions] == ["marked", "plain"]
    assert sum(predictions[0].probabilities.values()) == pytest.approx(1)
    alone = predict(result.directory.path, texts[:1])
    assert alone[0].probabilities == pytest.approx(predictions[0].probabilities, abs=1e-5)
    with pytest.raises(DataError, match="text 2 is empty"):
        predict(result.directory.path, ["a", " "])


def test_labels_are_given_from_one_half_on_where_no_best_threshold_was_found(
    tmp_path: Path, bases: Path
) -> None:
    """Where the outputs after training were not finite, the summary holds null for it."""
    rows = [
        row | {"label": [sign for sign in "a#" if sign in row["text"]]} for row in marked_rows(48)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    train = TrainSettings(max_steps=1, batch_size=16)
    run = run_of(tmp_path, bases / "bert", objective=Classification(kind="multi"), train=train)
    directory = tunesmith.train(run).directory
    summary = json.loads(directory.summary.read_text())
    summary["after"]["threshold"] = None
    directory.summary.write_text(json.dumps(summary))
    (found,) = predict(directory.path, ["#a"])
    likely = [label for label, share in found.probabilities.items() if share > 0.5]
    assert found.said.split() == likely


def test_a_run_that_writes_predicts_nothing(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 8
    write_rows(tmp_path / "sft.jsonl", rows)
    run = run_of(
        tmp_path,
        tiny_model,
        objective=SFT(),
        data=DataSettings(train=[Source(path=str(tmp_path / "sft.jsonl"))]),
        train=TrainSettings(max_steps=1, batch_size=4),
    )
    directory = tunesmith.train(run).directory.path
    with pytest.raises(SpecError, match="its objective is sft, which labels nothing"):
        predict(directory, ["a"])


def test_a_classifier_does_not_chat(
    tmp_path: Path, bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = TrainSettings(max_steps=1, batch_size=4)
    directory = tunesmith.train(run_of(tmp_path, bases / "bert", train=short)).directory.path
    with pytest.raises(SystemExit):
        main(["chat", str(directory)])
    assert "so it does not chat; use `tunesmith predict" in capsys.readouterr().err
    main_ok(["predict", str(directory), "--text", "#a#b", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert set(said["probabilities"]) == {"marked", "plain"}


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in {0, None}


def test_generated_metrics_are_refused(tmp_path: Path, bases: Path) -> None:
    run = run_of(tmp_path, bases / "bert", evaluation=EvaluationSettings(metrics=["bleu"]))
    with pytest.raises(SpecError, match=r"evaluation.metrics: bleu compares generated replies"):
        tunesmith.train(run)


def test_rows_longer_than_the_positions_are_refused(tmp_path: Path, bases: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 100, "label": c} for c in "xyxy"])
    data = DataSettings(train=[Source(path=str(tmp_path / "rows.jsonl"))], max_length=200)
    with pytest.raises(SpecError, match="has positions for 80; use at most 80"):
        tunesmith.train(run_of(tmp_path, bases / "bert", data=data))


def test_evaluation_rows_longer_than_the_positions_are_refused(tmp_path: Path, bases: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [{"text": "a" * 100, "label": "plain"}])
    short = write_rows(tmp_path / "short.jsonl", marked_rows(8))
    data = DataSettings(train=[Source(path=str(short))], evaluation=[Source(path=str(long))])
    with pytest.raises(SpecError, match="has positions for 80; use at most 80"):
        tunesmith.train(run_of(tmp_path, bases / "bert", data=data))


def test_positions_behind_padding_and_those_of_a_prompt_hold_no_text(
    tmp_path: Path, bases: Path
) -> None:
    rows = [{"text": "a" * 74, "label": c} for c in "xyxy"]  # 76 tokens
    path = str(write_rows(tmp_path / "long.jsonl", rows))
    run = run_of(tmp_path, bases / "roberta", method=PromptTuning(tokens=4))
    run = run.model_copy(update={"data": DataSettings(train=[Source(path=path)])})
    with pytest.raises(SpecError, match="has positions for 73; use at most 73"):
        tunesmith.train(run)  # of 80 the first 3 stay empty, and 4 are taken


def test_a_text_longer_than_the_positions_is_cut_by_predict_and_refused_by_eval(
    tmp_path: Path, bases: Path
) -> None:
    data = DataSettings(train=[Source(path=str(tmp_path / "rows.jsonl"))])
    train = TrainSettings(max_steps=1, batch_size=4)
    run = run_of(tmp_path, bases / "bert", data=data, train=train)
    directory = tunesmith.train(run).directory.path
    whole, cut = predict(directory, ["#a" * 200, "#a" * 39])
    assert whole.probabilities == pytest.approx(cut.probabilities, abs=1e-5)
    long = write_rows(tmp_path / "long.jsonl", [{"text": "#a" * 200, "label": "marked"}])
    with pytest.raises(SpecError, match="has positions for 80; use at most 80"):
        evaluate(directory, data=str(long))


@pytest.mark.parametrize("templates", [False, True])
def test_a_file_is_predicted_as_the_runs_own_rows_are_read(
    tmp_path: Path, bases: Path, templates: bool
) -> None:
    rows = [r | {"about": "#" * n} for n, r in enumerate(marked_rows(12))]
    path = str(write_rows(tmp_path / "pairs.jsonl", rows))
    source = (
        Source(path=path, prompt="{about}: {text}", completion="{label}")
        if templates
        else Source(path=path, columns={"text_pair": "about"})
    )
    if not templates:
        rows[0]["about"] = "-"
        write_rows(tmp_path / "pairs.jsonl", rows)
    data = DataSettings(train=[source], evaluation=[source], max_length=64)
    result = tunesmith.train(
        run_of(tmp_path, bases / "bert", data=data, evaluation=EvaluationSettings(samples=12))
    )
    samples = json.loads(result.directory.samples.read_text())
    predictions = predict_file(result.directory.path, path)
    said = [f"{p.said} ({max(p.probabilities.values()):.2f})" for p in predictions]
    assert said == [sample["after"] for sample in samples]


@pytest.fixture(scope="module")
def of_words(tmp_path_factory: pytest.TempPathFactory, bases: Path) -> Path:
    """A run that labels words."""
    folder = tmp_path_factory.mktemp("words")
    rows = [{"tokens": ["a#", "b", "#c"], "tags": ["M", "O", "M"]}, {"tokens": ["d"], "tags": "O"}]
    rows = [row | {"tags": list(row["tags"])} for row in rows]
    write_rows(folder / "rows.jsonl", rows * 8)
    data = DataSettings(train=[Source(path=str(folder / "rows.jsonl"))], max_length=64)
    train = TrainSettings(max_steps=8, batch_size=4, learning_rate=2e-2)
    run = run_of(folder, bases / "bert", objective=TokenClassification(), data=data, train=train)
    return tunesmith.train(run).directory.path


def test_words_that_are_not_read_keep_the_others_in_their_places(
    of_words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["a#", "", "b", "c" * 70, "d"]  # no token; all that is left of the 64 tokens
    file = write_rows(tmp_path / "new.jsonl", [{"tokens": words}, {"tokens": words[::2]}])
    long, short = (one.said.split() for one in predict_file(of_words, file))
    assert [label == "?" for label in long] == [False, True, False, False, True]
    assert "?" not in short
    assert len(short) == 3
    assert "2 words have no label and are marked ?" in caplog.text
    assert predict(of_words, ["a# b d"])[0].said.split() == short


def test_numbers_in_the_text_column_are_texts_as_they_are_in_training(
    tmp_path: Path, bases: Path
) -> None:
    rows = [{"text": n, "label": "ab"[n % 2]} for n in range(12)]
    write_rows(tmp_path / "rows.jsonl", rows)
    data = DataSettings(train=[Source(path=str(tmp_path / "rows.jsonl"))])
    train = TrainSettings(max_steps=1, batch_size=4)
    directory = tunesmith.train(run_of(tmp_path, bases / "bert", data=data, train=train)).directory
    new = write_rows(tmp_path / "new.jsonl", [{"text": 12}, {"text": None}])
    with pytest.raises(DataError, match=r"row 2: 'text' is null"):
        predict_file(directory.path, new)
    write_rows(new, [{"text": 12}])
    assert predict_file(directory.path, new) == predict(directory.path, ["12"])


def test_a_file_without_the_second_text_is_refused(tmp_path: Path, bases: Path) -> None:
    rows = [r | {"about": f"{n}"} for n, r in enumerate(marked_rows(12))]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    data = DataSettings(train=[Source(path=str(path), columns={"text_pair": "about"})])
    train = TrainSettings(max_steps=1, batch_size=4)
    result = tunesmith.train(run_of(tmp_path, bases / "bert", data=data, train=train))
    plain = write_rows(tmp_path / "plain.jsonl", marked_rows(2))
    with pytest.raises(DataError, match=r"plain.jsonl, row 1: has no column 'text_pair'"):
        predict_file(result.directory.path, plain)
