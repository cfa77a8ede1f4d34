"""The feature-based approach: cached features, every classifier, what is written and refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

from classifiers import marked_rows, save_base, write_rows
from tunesmith.cli import main
from tunesmith.errors import CheckpointError, DataError, SetupError, SpecError
from tunesmith.jobs.compare import compare
from tunesmith.jobs.comparison_spec import load_comparison
from tunesmith.jobs.evaluate import evaluate
from tunesmith.jobs.features import FeatureResult, learn_from_features
from tunesmith.jobs.features_classify import fit
from tunesmith.jobs.features_spec import FeatureSettings, load_feature_file
from tunesmith.jobs.predict import predict, predict_file


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("decoder"), "llama")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tunesmith.jobs.evidence.store", lambda: tmp_path / "store")
    return tmp_path / "cache" / "features"


@pytest.fixture
def run_file(tmp_path: Path, encoder: Path) -> Path:
    """A run file over marked rows."""
    write_rows(tmp_path / "rows.jsonl", marked_rows(200))
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, encoder)))
    return path


def settings(folder: Path, base: Path) -> dict[str, Any]:
    return {
        "output": str(folder / "runs"),
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "holdout": 60, "max_length": 64},
        "evaluation": {"batch_size": 16},
        "engine": {"device": "cpu"},
    }


def learn(path: Path, *overrides: str, said: list[str] | None = None) -> FeatureResult:
    say = (lambda line: None) if said is None else said.append
    return learn_from_features(load_feature_file(path, overrides), say, overwrite=True)


@pytest.mark.parametrize(
    "classifier", ["logistic_regression", "linear_svm", "random_forest", "gradient_boosting"]
)
def test_every_classifier_learns_and_says_how_sure_it_is(run_file: Path, classifier: str) -> None:
    result = learn(run_file, f"features.classifier={classifier}", "features.trees=30")
    written = json.loads(result.directory.summary.read_text())
    assert written["method"] == "features"
    assert written["after"]["accuracy"] > 0.9
    assert set(written["after"]) == {"accuracy", "macro_f1", "mcc"} == set(written["intervals"])
    low, high = written["intervals"]["accuracy"]
    assert low < written["after"]["accuracy"] <= high + 1e-9
    outcomes = json.loads(result.directory.outcomes.read_text())["accuracy"]
    assert len(outcomes) == 60
    assert np.mean(outcomes) == pytest.approx(written["after"]["accuracy"])
    linear = classifier in {"logistic_regression", "linear_svm"}
    assert result.directory.classifier.exists() == linear
    assert written["trainable_parameters"] == (32 + 1 if linear else None)
    assert not list(result.directory.path.rglob("*.pkl"))


def test_features_are_computed_once(
    run_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = learn(run_file)
    stamps = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(stamps) == 2  # training and evaluation rows
    with monkeypatch.context() as no_model:
        no_model.setattr("tunesmith.jobs.features_embed.load_base", None)
        said: list[str] = []
        again = learn(run_file, "seed=1", "features.classifier=linear_svm", said=said)
        assert sum("cached" in line for line in said) == 2
    assert again.summary["tokens"] == 0
    assert first.summary["tokens"] > 0
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == stamps
    assert learn(run_file).summary["after"] == first.summary["after"]


@pytest.mark.parametrize(
    "override", ["features.pooling=cls", "data.max_length=8", "model.dtype=bfloat16"]
)
def test_what_changes_features_makes_them_anew(run_file: Path, cache: Path, override: str) -> None:
    learn(run_file)
    learn(run_file, override)
    assert len(list(cache.iterdir())) == 4


def test_a_text_that_changes_is_embedded_again(run_file: Path, cache: Path) -> None:
    learn(run_file)
    rows = marked_rows(200)
    rows[0]["text"] += "z"
    write_rows(run_file.with_name("rows.jsonl"), rows)
    learn(run_file)
    assert len(list(cache.iterdir())) > 2


def test_a_damaged_cache_is_mended(run_file: Path, cache: Path) -> None:
    first = learn(run_file)
    whole = {path: path.read_bytes() for path in cache.iterdir()}
    for path, content in whole.items():
        path.write_bytes(content[:50])
    assert learn(run_file).summary["after"] == first.summary["after"]
    assert {path: path.read_bytes() for path in cache.iterdir()} == whole


def test_features_in_the_cache_are_in_the_order_of_the_rows(
    run_file: Path, cache: Path, encoder: Path
) -> None:
    few = write_rows(run_file.with_name("few.jsonl"), marked_rows(6, seed=3))
    learn(run_file, f"data.evaluation=[{{path: {few}}}]")
    found = next(x for p in cache.iterdir() if len(x := load_file(p)["features"]) == 6)
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    for vector, row in zip(found, marked_rows(6, seed=3), strict=True):
        inputs = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            expected = model.eval()(**inputs).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_saved_map_is_logistic_regression_on_standardised_features(
    tmp_path: Path, labels: tuple[str, ...], weighted: bool
) -> None:
    random = np.random.default_rng(0)
    features = (3 + 5 * random.normal(size=(120, 7))).astype(np.float32)
    features[:, 6] = 1.0  # a feature that never differs
    targets = random.integers(len(labels), size=120)
    features[:, 0] += 4 * targets
    weights = np.array([1.0, 4.0, 2.0][: len(labels)], np.float32) if weighted else None
    fitted = fit(
        FeatureSettings(C=0.3), features, targets, labels=labels, class_weights=weights, seed=0
    )
    assert fitted.linear is not None
    fitted.linear.save(tmp_path / "map.safetensors", labels=labels, pooling="mean")
    with safe_open(tmp_path / "map.safetensors", "numpy") as file:
        weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        assert json.loads(file.metadata()["labels"]) == list(labels)
    scores = features @ weight.T + bias
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))

    inputs = StandardScaler().fit_transform(features.astype(np.float64))
    rows = None if weights is None else weights[targets]
    expected = LogisticRegression(C=0.3, max_iter=1000).fit(inputs, targets, sample_weight=rows)
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected.predict_proba(inputs), atol=1e-4)
    np.testing.assert_array_equal(fitted.predict(features), expected.predict(inputs))


def test_the_penalty_is_found_where_features_are_mostly_noise() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(80, 200)).astype(np.float32)
    targets = (features[:, 0] + random.normal(size=80) > 0).astype(np.int64)
    fitted = fit(
        FeatureSettings(), features, targets, labels=("a", "b"), class_weights=None, seed=0
    )
    assert fitted.C is not None
    assert fitted.C < 1.0  # the weakest penalty fits the noise


def test_a_class_of_one_row_still_fits() -> None:
    features = np.eye(4, dtype=np.float32)
    fitted = fit(
        FeatureSettings(),
        features,
        np.array([0, 0, 0, 1]),
        labels=("a", "b"),
        class_weights=None,
        seed=0,
    )
    assert fitted.C == 0.01


def test_a_decoder_is_read_at_its_last_token(tmp_path: Path, decoder: Path, run_file: Path) -> None:
    run_file.write_text(yaml.safe_dump(settings(tmp_path, decoder)))
    summary = learn(run_file, "evaluation.limit=20").summary
    assert summary["features"]["pooling"] == "last"  # type: ignore[index,call-overload]
    assert summary["kind"] == "decoder"
    with pytest.raises(SpecError, match=r"features\.pooling: cls: the first token"):
        learn(run_file, "features.pooling=cls")


def test_the_record_runs_again(run_file: Path) -> None:
    first = learn(run_file, "features.pooling=cls")
    assert first.directory.path.name == "job-features"
    again = learn(first.directory.spec)
    assert again.summary["after"] == first.summary["after"]
    assert again.summary["features"] == first.summary["features"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective={name: sft}", "features learns one label a text, and this is sft"),
        ("objective={name: classification, kind: multi}", "with kind multi"),
        ("objective={name: classification, label_smoothing: 0.1}", "label_smoothing"),
        ("data.mixing=weighted", "features reads every row once"),
        ("features.pool=cls", r"features\.pool: .*known here: pooling, classifier"),
        ("features.classifier=naive_bayes", r"features\.classifier: Input should be"),
        ("features.C=0", r"features\.C: "),
        ("features=cls", "features: Input should be"),
    ],
)
def test_what_features_cannot_do_is_refused(run_file: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        learn(run_file, override)
    assert not run_file.with_name("runs").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "abc"}, "has no column 'label'"),
        ({"text": "abc", "label": float("nan")}, "'label' is nan"),
        ({"text": " ", "label": "plain"}, "'text' is empty"),
    ],
)
def test_bad_rows_are_named(run_file: Path, row: dict[str, object], message: str) -> None:
    write_rows(run_file.with_name("rows.jsonl"), [*marked_rows(20), row])
    with pytest.raises(DataError, match=message):
        learn(run_file)


def test_labels_without_rows_are_named(run_file: Path) -> None:
    plain = [row for row in marked_rows(40) if row["label"] == "plain"]
    write_rows(run_file.with_name("plain.jsonl"), plain)
    with pytest.raises(DataError, match="all 20 rows have the label 'plain'"):
        learn(run_file, f"data.train.0.path={run_file.parent}/plain.jsonl", "data.holdout=0")
    with pytest.raises(DataError, match="'rare' has no training row"):
        learn(run_file, "objective={name: classification, labels: [marked, plain, rare]}")
    unseen = [{"text": "abc", "label": "unseen"}]
    write_rows(run_file.with_name("unseen.jsonl"), unseen)
    with pytest.raises(DataError, match="the label 'unseen' is none"):
        learn(run_file, f"data.evaluation=[{{path: {run_file.parent}/unseen.jsonl}}]")


def test_the_extra_is_named_where_scikit_learn_is_missing(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(SetupError, match=r"pip install 'tunesmith\[metrics\]'"):
        learn(run_file)


def test_the_command_keeps_what_is_there(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["features", str(run_file), "features.C=0.01"]
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *more])
        assert stopped.value.code == 0
        assert "95 % interval" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="--overwrite starts again"):
        learn_from_features(load_feature_file(run_file), print)


def test_a_comparison_has_features_beside_what_trains(tmp_path: Path, run_file: Path) -> None:
    run = yaml.safe_load(run_file.read_text()) | {
        "objective": {"name": "classification"},
        "train": {"max_steps": 4, "batch_size": 8},
    }
    path = tmp_path / "ladder.yaml"
    rows = [
        {"features": {"C": 0.1}},
        {"name": "forest", "features": {"classifier": "random_forest", "trees": 20}},
        {"name": "head", "method": {"name": "last_layer", "blocks": 0, "head": True}},
    ]
    values = {"output": str(tmp_path / "runs"), "run": run, "variants": rows, "seeds": 1}
    path.write_text(yaml.safe_dump(values | {"learning_rates": 2}))
    findings = compare(load_comparison(path), path, lambda line: None)
    found = {row.name: row for row in findings.rows}
    for name in ("features", "forest", "head"):
        assert found[name].failed is None
        assert found[name].low is not None  # judged by the same rows, so they can be compared
    assert found["features"].trainable_parameters == 33
    assert found["features"].seconds_per_step is None
    assert found["features"].rates == {}
    assert len(found["head"].rates) > 1
    stamp = (tmp_path / "runs/ladder/features/seed-0/summary.json").stat().st_mtime_ns
    compare(load_comparison(path), path, lambda line: None)
    assert (tmp_path / "runs/ladder/features/seed-0/summary.json").stat().st_mtime_ns == stamp


def test_a_row_cannot_have_a_method_and_features(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("run: {}\nvariants: [{method: lora, features: {}}]\n")
    with pytest.raises(SpecError, match="a row has method or features, not both"):
        load_comparison(path)


def test_the_ladder_is_four_runs() -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "ladder.yaml"
    ladder = load_comparison(path)
    titles = [ladder.run_of(variant, path).name for variant in ladder.rows()]
    assert titles == ["features", "last_layers", "full", "lora"]


@pytest.mark.parametrize("classifier", ["logistic_regression", "linear_svm"])
def test_predictions_are_those_of_the_fitted_classifier(run_file: Path, classifier: str) -> None:
    result = learn(run_file, f"features.classifier={classifier}")
    rows = marked_rows(20, seed=5)
    said = predict(result.directory.path, [row["text"] for row in rows])
    right = [p.said == row["label"] for p, row in zip(said, rows, strict=True)]
    assert sum(right) >= 18
    for prediction in said:
        shares = prediction.probabilities
        if classifier == "linear_svm":
            assert shares == {}  # a margin is no probability
        else:
            assert sum(shares.values()) == pytest.approx(1.0)
            assert max(shares, key=shares.__getitem__) == prediction.said


def test_the_evaluation_rows_are_predicted_as_they_were_measured(run_file: Path) -> None:
    few = write_rows(run_file.with_name("few.jsonl"), marked_rows(20, seed=3))
    result = learn(run_file, f"data.evaluation=[{{path: {few}}}]")
    said = predict_file(result.directory.path, few)
    kept = json.loads(result.directory.outcomes.read_text())["predictions"]["predicted"]
    assert [p.said for p in said] == [("marked", "plain")[index] for index in kept]


def test_trees_were_not_saved_and_cannot_predict(run_file: Path) -> None:
    result = learn(run_file, "features.classifier=random_forest", "features.trees=3")
    with pytest.raises(SpecError, match=r"random_forest is not saved, .*logistic_regression"):
        predict(result.directory.path, ["abc"])


def test_a_damaged_classifier_is_named(run_file: Path) -> None:
    result = learn(run_file)
    result.directory.classifier.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"classifier\.safetensors: is damaged"):
        predict(result.directory.path, ["abc"])


def test_the_page_of_features_shows_metrics_and_confusion(run_file: Path) -> None:
    page = learn(run_file).directory.report.read_text()
    for shown in ("method features", "Accuracy", "marked", "plain"):
        assert shown in page


def test_a_text_longer_than_the_positions_is_cut(run_file: Path) -> None:
    result = learn(run_file, "data.max_length=1024")
    whole, cut = predict(result.directory.path, ["#a" * 200, "#a" * 39])
    assert whole.probabilities == pytest.approx(cut.probabilities, abs=1e-6)


def test_what_loads_a_model_says_that_features_have_none(run_file: Path) -> None:
    result = learn(run_file)
    with pytest.raises(SpecError, match=r"a run of features, .*`tunesmith predict` uses it"):
        evaluate(result.directory.path)
