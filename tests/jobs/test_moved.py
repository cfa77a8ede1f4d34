"""A directory that was moved: its runs load, go on, and are not run again."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pairs import pair_rows, write_rows
from tunesmith.errors import SpecError
from tunesmith.jobs.align import align
from tunesmith.jobs.align_spec import load_alignment
from tunesmith.jobs.moved import Move, differences, same_but_moved
from tunesmith.jobs.result import load_run
from tunesmith.jobs.run_directory import check_free, open_finished


def chain(folder: Path, model: Path, rows: Path) -> Path:
    """Return an align file in `folder` whose second stage stands on the first."""
    values: dict[str, Any] = {
        "name": "chain",
        "output": str(folder / "runs"),
        "common": {
            "model": {"name": str(model), "dtype": "float32"},
            "data": {"train": [{"path": str(rows)}], "max_length": 96},
            "train": {"max_steps": 2, "batch_size": 4},
            "evaluation": {"samples": 0},
            "engine": {"device": "cpu", "threads": 1},
        },
        "stages": [
            {"name": "sft"},
            {"name": "dpo", "from": "sft", "run": {"objective": {"name": "dpo"}}},
        ],
    }
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_moved_chain_loads_and_is_not_run_again(tmp_path: Path, tiny_model: Path) -> None:
    """The rows stay where they are; the stage before, whose adapter DPO stands on, moves along."""
    told = [row | {"completion": row["chosen"]} for row in pair_rows(24)]
    rows = write_rows(tmp_path / "rows.jsonl", told)
    old, new = tmp_path / "server", tmp_path / "laptop" / "from-server"
    for folder in (old, new.parent):
        folder.mkdir()
    asked = chain(old, tiny_model, rows)
    align(load_alignment(asked), str(asked), lambda _: None)
    logits = load_run(old / "runs" / "chain" / "dpo").tuned.model.get_input_embeddings().weight
    old.rename(new)

    loaded = load_run(new / "runs" / "chain" / "dpo")
    assert loaded.run.model.adapter == str(new / "runs" / "chain" / "sft" / "adapter")
    assert loaded.run.data.train[0].path == str(rows)
    assert (loaded.tuned.model.get_input_embeddings().weight == logits).all()
    said: list[str] = []
    asked = chain(new, tiny_model, rows)
    align(load_alignment(asked), str(asked), said.append)
    assert said[:2] == ["sft: finished before", "dpo: finished before"]
    run = load_alignment(asked)
    stage = run.run_of(run.stage("dpo"), str(asked))
    assert check_free(stage.resolved(), resume=True, overwrite=False).path == stage.directory
    other = stage.model_copy(update={"seed": 7}).resolved()
    with pytest.raises(SpecError, match="seed differ"):
        check_free(other, resume=True, overwrite=False)


def test_paths_that_are_still_there_stay(tmp_path: Path, tiny_model: Path) -> None:
    """A copy reads what the original reads, which may be elsewhere and must not be guessed."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    rows = write_rows(tmp_path / "a" / "rows.json", pair_rows(4))
    beside = write_rows(tmp_path / "b" / "rows.json", pair_rows(4))
    run = {
        "name": "one",
        "output": str(tmp_path / "a"),
        "model": {"name": str(tiny_model)},
        "data": {"train": [{"path": str(rows)}]},
    }
    place = tmp_path / "b" / "one"
    place.mkdir()
    (place / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    assert open_finished(place)[1].data.train[0].path == str(rows)
    rows.unlink()
    found = open_finished(place)[1]
    assert found.data.train[0].path == str(beside)
    assert found.output == str(tmp_path / "b")
    beside.unlink()
    assert open_finished(place)[1].data.train[0].path == str(rows)  # named as it was given


@pytest.mark.parametrize(
    ("before", "now", "old", "new"),
    [
        ("/a/runs/chain", "/b/runs/chain", "/a", "/b"),
        ("/a/runs/chain", "/a/runs/other", "/a/runs/chain", "/a/runs/other"),
        ("/runs", "/home/runs", "/", "/home"),
        ("/a/runs", "/a/runs", "/", "/"),
    ],
)
def test_a_move_is_as_far_up_as_places_differ(before: str, now: str, old: str, new: str) -> None:
    assert Move.between(Path(before), Path(now)) == (Path(old), Path(new))


def test_a_move_is_no_other_difference() -> None:
    before = {"output": "/a/runs", "model": {"name": "/a/m"}, "data": ["/a/x", "/c/y"], "n": 1}
    now = {"output": "/b/runs", "model": {"name": "/b/m"}, "data": ["/b/x", "/c/y"], "n": 1}
    assert not list(differences(before, now))
    assert not list(differences(before, now | {"model": {"name": "/a/m"}}))
    assert list(differences(before, now | {"n": 2})) == [("n",)]
    assert list(differences(before, now | {"model": {"name": "/b/n"}})) == [("model", "name")]
    assert list(differences(before, now | {"more": None, "less": 1})) == [("less",)]
    texts = [yaml.safe_dump(values) for values in (before, now)]
    assert same_but_moved(*texts)
    assert not same_but_moved(f"# of one\n{texts[0]}", f"# of other\n{texts[1]}")
    assert not same_but_moved(texts[0][:40], texts[1])
    assert not same_but_moved("", texts[1])
