"""Finished work whose data has changed: it is done again, and work of other data is not."""

import gzip
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pairs import pair_rows, write_rows
from tunesmith.data.settings import DataSettings, Source
from tunesmith.jobs.align import align
from tunesmith.jobs.align_spec import load_alignment
from tunesmith.jobs.comparison_runs import Trial, run_trials
from tunesmith.jobs.data_marks import MARK, data_hash, data_line, same_data
from tunesmith.jobs.moved import same_but_moved
from tunesmith.spec import Run


def settings(folder: Path, **more: Any) -> DataSettings:
    return DataSettings(train=[Source(path=str(folder / "rows.jsonl"))], **more)


def test_the_mark_says_what_the_files_hold(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", pair_rows(4))
    line = data_line(settings(tmp_path))
    assert line.startswith(MARK)
    assert line.endswith("\n")
    os.utime(path, (1, 1))
    assert data_line(settings(tmp_path)) == line  # when it was written does not count
    held = Source(path=str(write_rows(tmp_path / "held.jsonl", pair_rows(3))))
    both = data_line(settings(tmp_path, evaluation=[held]))
    assert both != line
    text = path.read_text()
    path.write_text(text.replace("a", "o"))
    assert data_line(settings(tmp_path)) != line
    path.write_text(text)
    assert data_line(settings(tmp_path)) == line


@pytest.mark.parametrize("pattern", ["*.jsonl", "", "part-1.jsonl"])
def test_every_file_of_a_source_counts(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in (1, 2):
        write_rows(folder / f"part-{number}.jsonl", pair_rows(2, seed=number))
    source = Source(path=str(folder / pattern))
    before = data_hash([source])
    write_rows(folder / "part-2.jsonl", pair_rows(2, seed=3))
    assert (data_hash([source]) == before) == (pattern == "part-1.jsonl")


def test_names_and_streams_say_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", pair_rows(4))
    assert not data_line(settings(tmp_path, streaming=True))
    names = [Source(path="generated/arithmetic"), Source(path="somebody/some-set")]
    assert data_hash(names) is None
    gone = Source(path=str(tmp_path / "gone.jsonl.gz"))
    assert data_hash([Source(path=str(tmp_path / "rows.jsonl")), gone]) is None
    Path(gone.path).write_bytes(gzip.compress(b'{"text": "a"}'))
    assert data_hash([gone]) is not None


def test_only_what_both_say_is_compared() -> None:
    texts = [f"{mark}output: /a\nseed: 1\n" for mark in ("", f"{MARK}1\n", f"{MARK}2\n")]
    unsaid, one, other = texts
    assert same_data(unsaid, one)
    assert same_data(one, one)
    assert not same_data(one, other)
    assert same_but_moved(unsaid, one)
    assert same_but_moved(one, unsaid)
    assert not same_but_moved(one, other)


def test_a_chain_is_run_again_where_its_data_has_changed(tmp_path: Path, tiny_model: Path) -> None:
    told = [row | {"completion": row["chosen"]} for row in pair_rows(24)]
    rows = write_rows(tmp_path / "rows.jsonl", told)
    held = write_rows(tmp_path / "held.jsonl", pair_rows(6, seed=1))
    asked = tmp_path / "chain.yaml"
    values: dict[str, Any] = {
        "name": "chain",
        "output": str(tmp_path / "runs"),
        "common": {
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "data": {"train": [{"path": str(rows)}], "max_length": 96},
            "train": {"max_steps": 1, "batch_size": 4},
            "evaluation": {"samples": 0},
            "engine": {"device": "cpu", "threads": 1},
        },
        "stages": [{"name": "sft"}],
        "judge": {"kind": "regex", "pattern": "a"},
        "judged": {"prompts": [{"path": str(held)}], "limit": 2, "max_new_tokens": 2},
    }
    asked.write_text(yaml.safe_dump(values))

    def run() -> tuple[list[str], int]:
        said: list[str] = []
        align(load_alignment(asked), str(asked), said.append)
        replies = tmp_path / "runs" / "chain" / "judged" / "sft.json"
        return said, replies.stat().st_mtime_ns

    _, first = run()
    said, second = run()
    assert said[0] == "sft: finished before"
    assert second == first
    held.write_text(held.read_text() + "\n")
    said, third = run()
    assert said[0] == "sft: finished before"
    assert third != first
    write_rows(rows, [*told, told[0]])
    said, _ = run()
    assert said[0].startswith("sft: starting")


def test_a_row_of_a_comparison_is_run_again_where_its_data_has_changed(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = [{"prompt": f"Say {n}", "completion": "yes" * n} for n in range(1, 13)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run = Run.model_validate(
        {
            "name": "seed-0",
            "output": str(tmp_path / "runs"),
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "data": {"train": [{"path": str(path)}], "max_length": 96},
            "train": {"max_steps": 1, "batch_size": 2},
            "evaluation": {"samples": 0},
            "engine": {"device": "cpu", "threads": 1},
        }
    )
    trial = Trial("lora", run, keep=False)
    assert run_trials([trial], at_once=1, done=lambda _: None) == [trial]
    assert trial.finished()
    write_rows(path, rows[:-1])
    assert not trial.finished()
    write_rows(path, rows)
    assert trial.finished()
