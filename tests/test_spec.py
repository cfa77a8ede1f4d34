"""A run file says what it means, or says what is wrong with it."""

import json
from pathlib import Path

import pytest
import yaml

from tunesmith import LoRA, PrefixTuning, Run, Source
from tunesmith.errors import SpecError
from tunesmith.spec import load_run_file, schema

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MINIMAL = "data:\n  train:\n    - path: rows.jsonl\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_data_alone_is_a_whole_run(tmp_path: Path) -> None:
    run = load_run_file(write(tmp_path, MINIMAL))
    assert run.name == "mine"
    assert isinstance(run.method, LoRA)
    assert run.train.epochs == 1.0


def test_overrides_are_typed_like_the_file(tmp_path: Path) -> None:
    run = load_run_file(
        write(tmp_path, MINIMAL),
        ["method.rank=32", "train.learning_rate=1e-4", "data.train.0.limit=5", "seed=7"],
    )
    assert run.method.rank == 32
    assert run.train.learning_rate == 1e-4
    assert run.data.train[0].limit == 5
    assert run.seed == 7


def test_the_resolved_file_runs_again_as_it_stands(tmp_path: Path) -> None:
    first = load_run_file(write(tmp_path, MINIMAL), ["method.rank=3"]).resolved()
    again = tmp_path / "run.yaml"
    again.write_text(first.to_yaml())
    assert load_run_file(again).resolved() == first
    assert first.train.learning_rate == first.method.default_learning_rate


def test_several_methods_are_a_list_and_keep_their_own_rates(tmp_path: Path) -> None:
    text = "method:\n- {name: lora, rank: 3}\n- {name: prefix_tuning}\n"
    run = load_run_file(write(tmp_path, MINIMAL + text), ["method.1.length=7"])
    assert run.method == [LoRA(rank=3), PrefixTuning(length=7)]
    assert run.methods == tuple(run.method)
    assert run.method_name == "lora+prefix_tuning"
    assert run.resolved().train.learning_rate is None
    again = tmp_path / "run.yaml"
    again.write_text(run.resolved().to_yaml())
    assert load_run_file(again) == run.resolved()
    same_rates = run.model_copy(update={"method": [LoRA(), LoRA(targets=["mlp.up"])]})
    assert same_rates.resolved().train.learning_rate == LoRA.default_learning_rate


def test_one_method_is_a_sequence_of_one(tmp_path: Path) -> None:
    run = load_run_file(write(tmp_path, MINIMAL))
    assert run.methods == (LoRA(),)
    assert run.method_name == "lora"


def test_paths_are_resolved_and_names_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    run = load_run_file(write(tmp_path, MINIMAL)).resolved()
    assert run.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert run.model.name == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("methd: {name: lora}\n", ["mine.yaml:4: methd: unknown key", "'method'"]),
        ("method:\n  name: lora\n  rnk: 3\n", ["mine.yaml:6: method.rnk: unknown key", "'rank'"]),
        ("method: {name: lorra}\n", ["mine.yaml:4: method.name: 'lorra' is unknown", "'lora'"]),
        ("method: {name: lora, rank: 0}\n", ["mine.yaml:4: method.rank: 0", "greater than"]),
        ("method: {name: lora, rank: many}\n", ["mine.yaml:4: method.rank: 'many'", "integer"]),
        ("method: lora\n", ["mine.yaml:4: method", "mapping"]),
        ("method: []\n", ["mine.yaml:4: method: []", "at least 1"]),
        ("method: [lora]\n", ["mine.yaml:4: method.0: 'lora'", "mapping"]),
        ("method:\n- name: ia3\n- rank: 0\n", ["mine.yaml:6: method.1.rank: 0", "greater than"]),
        (
            "method:\n- {}\n- rnk: 3\n",
            ["mine.yaml:6: method.1.rnk: unknown key", "'rank'?; known here: alpha, bias"],
        ),
        ("method: [{name: lorra}]\n", ["mine.yaml:4: method.0.name: 'lorra' is", "'lora'"]),
        ("train: {schedule: cosin}\n", ["mine.yaml:4: train.schedule: 'cosin'", "'cosine'"]),
        ("train: {batch_size: 0}\n", ["mine.yaml:4: train.batch_size: 0"]),
        ("name: a/b\n", ["mine.yaml:4: name: 'a/b'"]),
    ],
)
def test_a_problem_is_named_with_line_and_key(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        load_run_file(write(tmp_path, MINIMAL + text))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_problem_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_run_file(write(tmp_path, MINIMAL + "seed: -1\ntrain: {epochs: 0}\n"))
    assert len(str(caught.value).splitlines()) == 2


def test_data_is_required(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="data: is required"):
        load_run_file(write(tmp_path, "seed: 1\n"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank", "is not an override"),
        ("seed.x=3", "seed is 5, which has no keys"),
        ("data.train.3.path=x", "'3' is not one of the 1 items"),
        ("method.rnk=3", "did you mean 'rank'"),
        ("method.rank=[1", "is not a YAML value"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("[", r"\[")):
        load_run_file(write(tmp_path, MINIMAL + "seed: 5\n"), [override])


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such run file"):
        load_run_file(tmp_path / "none.yaml")


def test_the_schema_knows_every_part_and_documents_it() -> None:
    described = schema()
    assert {"model", "method", "data", "train"} <= set(described["properties"])
    lora = described["$defs"]["LoRA"]
    assert lora["additionalProperties"] is False
    assert lora["properties"]["rank"]["description"]
    json.dumps(described)


def test_every_setting_is_documented() -> None:
    parts = schema()["$defs"]
    for name, part in parts.items():
        for key, value in part.get("properties", {}).items():
            # A section inside a section is told of where the section itself is.
            section = parts.get(value.get("$ref", "").rpartition("/")[2], {})
            told = value.get("description") or section.get("description")
            assert key == "name" or told, f"{name}.{key} has no help text"


RUN_FILES = [
    p
    for p in sorted(EXAMPLES.glob("*.yaml"))
    if not {"run", "stages"} & yaml.safe_load(p.read_text()).keys()
]
"""The others are comparisons of a run, and chains of runs."""


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_every_example_parses(path: Path) -> None:
    run = load_run_file(path)
    assert run.name == path.stem
    assert yaml.safe_load(run.to_yaml())


def test_python_says_the_same_as_a_file(tmp_path: Path) -> None:
    from tunesmith import DataSettings

    in_python = Run(name="mine", data=DataSettings(train=[Source(path="rows.jsonl")]))
    assert in_python == load_run_file(write(tmp_path, MINIMAL))
