"""Policies that say nothing: every reply is the end of the turn alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from reply_runs import adapter, events, run_of
from tunesmith.jobs import experience_written
from tunesmith.rollout.sample import Reply, Stops

SEEN = """
def f(prompts, replies):
    assert set(replies) == {''}
    return [0.5] * len(replies)
"""


def silent(
    model: object, prompts: Sequence[object], seeds: object, *, stops: Stops, **rest: Any
) -> list[Reply]:
    """Stands for `sample` with a policy that ends each turn at once."""
    del model, seeds, rest
    return [Reply([min(stops.tokens)], [-1.0], True) for _ in prompts]


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_a_run_whose_replies_are_empty_goes_on(
    tmp_path: Path, tiny_model: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experience_written, "sample", silent)
    (tmp_path / "seen.py").write_text(SEEN)
    whole = run_of(tmp_path, tiny_model, train={"max_steps": 1}).model_dump()
    whole["objective"] = {
        "name": objective,
        "rewards": [{"kind": "file", "path": str(tmp_path / "seen.py"), "function": "f"}],
        "rollout": {"replies": 16, "max_new_tokens": 6},
    }
    result = tunesmith.train(tunesmith.Run(**whole))
    (gathered,) = events(result.directory.path, "gathered")
    assert gathered["reward"] == 0.5
    assert all(values.isfinite().all() for values in adapter(result.directory.path).values())
