"""Two processes (torchrun, gloo) write, between them, the replies that one writes."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from reply_runs import adapter, events, run_of, train_in_two_processes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"epochs": 2, "kl": 0.05, "samples": 4},
    "ppo": {"epochs": 2, "kl": 0.05, "reward_scale": "running"},
}


def of(folder: Path, model: Path, name: str, *, rows: int) -> tunesmith.Run:
    """Six steps of four rows, `rows` of them in each process."""
    folder.mkdir()
    run = run_of(folder, model, train={"batch_size": rows})
    shared = {"rewards": run.objective.rewards, "rollout": run.objective.rollout}
    objective = {"name": name} | OBJECTIVES[name] | shared
    return tunesmith.Run(**(run.model_dump() | {"objective": objective}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_write_and_learn_what_one_does(
    tmp_path: Path, tiny_model: Path, name: str
) -> None:
    one = tunesmith.train(of(tmp_path / "one", tiny_model, name, rows=4)).directory.path
    run = of(tmp_path / "two", tiny_model, name, rows=2)
    train_in_two_processes(run, tmp_path / "two")
    two = tmp_path / "two" / "runs" / "job"
    ours, theirs = events(two, "gathered"), events(one, "gathered")
    # The same noise and, but for the rounding of a gradient that is summed in another order, the
    # same policy.
    assert [e["samples"] for e in ours] == [e["samples"] for e in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        for key in ("replies", "tokens", "length"):
            assert mine[key] == its[key]
        assert mine["reward"] == pytest.approx(its["reward"], abs=1e-9)
        assert mine["measured"] == pytest.approx(its["measured"], abs=1e-4)
    losses = [[e["loss"] for e in events(path, "step_done")] for path in (two, one)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for key, tensor in adapter(one).items():
        torch.testing.assert_close(adapter(two)[key], tensor, atol=1e-4, rtol=1e-3)
