"""Chains of alignment whose command is killed, inside stages, rounds and judging, and run again.

A reward function stops where it is told to, so every kill hits its moment: what a process has on
disk does not change while it waits.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

from reply_runs import events
from tunesmith.jobs.align import align
from tunesmith.jobs.align_spec import load_alignment

REWARD = '''
import json
import os
import time
from pathlib import Path

HERE = Path(__file__).parent


def held(name, replies):
    """Score replies, or wait for the kill where a file says to."""
    hold = HERE / f"{name}.hold"
    if hold.exists():
        file, text, times = json.loads(hold.read_text())
        if Path(file).exists() and Path(file).read_text().count(text) >= times:
            (HERE / f"{name}.reached").write_text(f"{os.getppid()} {os.getpid()}")
            time.sleep(600)
    return [sum(ord(c) % 2 for c in reply) / 6 for reply in replies]


def ppo(prompts, replies):
    return held("ppo", replies)


def grpo(prompts, replies):
    return held("grpo", replies)


def online(prompts, replies):
    return held("online", replies)


def judge(prompts, replies):
    return held("judge", replies)
'''
STEP = '"event": "step_done"'
SECONDS = 480.0
ROUND_STEPS = 32
"""Of a round of online DPO: enough for a kill to come before the last one."""


class Hold(NamedTuple):
    """The moment at which a reward function stops: once `text` stands in `file` so many times."""

    name: str
    file: Path
    text: str
    times: int


class Chains(NamedTuple):
    """A chain that nothing stopped and one that was killed time and again, both done."""

    whole: Path
    killed: Path
    seen: dict[str, Any]
    """What lay there at each kill."""
    processes: list[int]
    """That worked for the killed commands."""


def chain_of(folder: Path, model: Path) -> dict[str, Any]:
    """SFT, then PPO, GRPO and two rounds of online DPO from it, all three at once."""
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"Say {'a' * (n % 5)} {n}", "completion": f"yes {n}"} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = [{"path": str(folder / "rows.jsonl")}]

    def reward(name: str) -> list[dict[str, Any]]:
        file = str(folder / "reward.py")
        return [{"kind": "file", "path": file, "function": name, "timeout": 900.0}]

    def replies(name: str, **more: Any) -> dict[str, Any]:
        rollout = {"replies": 12, "max_new_tokens": 6}
        return {"name": name, "epochs": 2, "rewards": reward(name), "rollout": rollout} | more

    return {
        "output": str(folder / "runs"),
        "at_once": 3,
        "common": {
            "model": {"name": str(model), "dtype": "float32"},
            "method": {"name": "lora", "rank": 4},
            "data": {"train": data, "holdout": 3, "max_length": 64},
            "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "warmup": 0},
            "evaluation": {"samples": 0},
            "engine": {"device": "cpu", "threads": 1},
        },
        "stages": [
            {"name": "sft"},
            # Six steps a roll-out, in two passes of three; 4 and 5 are in the second one.
            stage("ppo", replies("ppo", kl_target=1.0, reward_scale="running")),
            stage("grpo", replies("grpo", samples=4, kl=0.05)),
            {
                "name": "online",
                "from": "sft",
                "run": {
                    "objective": {"name": "dpo"},
                    "train": {"max_steps": ROUND_STEPS},
                    "checkpoint": {"every_steps": 4},
                },
                "online": {
                    "rounds": 2,
                    "prompts": 6,
                    "samples": 3,
                    "max_new_tokens": 6,
                    "rewards": reward("online"),
                },
            },
        ],
        "judge": reward("judge"),
        "judged": {
            "prompts": data,
            "limit": 4,
            "max_new_tokens": 6,
            "policies": ["online", "grpo", "ppo"],
            "points": 2,
        },
    }


def stage(name: str, objective: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "from": "sft",
        "run": {
            "objective": objective,
            "train": {"max_steps": 8},
            "evaluation": {"every_steps": 5},
            "checkpoint": {"every_steps": 4, "keep": 4},
        },
    }


def finish(chain: dict[str, Any], folder: Path, name: str) -> Path:
    """Run a chain to its end and return its directory."""
    path = written(chain, folder, name)
    align(load_alignment(path), str(path), lambda _: None)
    return folder / "runs" / name


def written(chain: dict[str, Any], folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(chain))
    return path


def kill_once(folder: Path, path: Path, holds: list[Hold], then: Callable[[], bool]) -> list[int]:
    """Run the command, kill it when all rewards wait and `then` is true; return its processes."""
    for hold in holds:
        (folder / f"{hold.name}.hold").write_text(json.dumps([str(hold.file), *hold[2:]]))
    reached = [folder / f"{hold.name}.reached" for hold in holds]
    command = [sys.executable, "-m", "tunesmith", "align", str(path)]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    deadline = time.monotonic() + SECONDS
    try:
        while not (all(file.exists() and file.read_text() for file in reached) and then()):
            so_far = (folder / "said.txt").read_text()
            assert process.poll() is None, so_far
            assert "error:" not in so_far, so_far
            assert time.monotonic() < deadline, so_far
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    processes = [int(number) for file in reached for number in file.read_text().split()]
    for hold in holds:
        (folder / f"{hold.name}.hold").unlink()
        (folder / f"{hold.name}.reached").unlink()
    return processes


def newest(run: Path) -> int:
    """The step of a run's newest checkpoint."""
    found = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return max(found, default=0)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def gone(process: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Chains:
    folder = tmp_path_factory.mktemp("chains")
    chain = chain_of(folder, tiny_model)
    killed = folder / "runs" / "killed"
    path = written(chain, folder, "killed")
    ppo, grpo, online = killed / "ppo", killed / "grpo", killed / "online"
    seen: dict[str, Any] = {}
    # While the policies are evaluated, two steps into the second pass over a roll-out; and while
    # the pairs of a round are scored.
    processes = kill_once(
        folder,
        path,
        [
            Hold("ppo", ppo / "metrics.jsonl", STEP, 5),
            Hold("grpo", grpo / "metrics.jsonl", STEP, 5),
            Hold("online", killed / "align.yaml", "", 0),
        ],
        lambda: True,
    )
    seen["first"] = {"checkpoints": [newest(ppo), newest(grpo)], "files": files(online)}
    # While the next roll-outs are scored, and in the training of the second round.
    second = online / "round-2"
    processes += kill_once(
        folder,
        path,
        [
            Hold("ppo", ppo / "metrics.jsonl", STEP, 6),
            Hold("grpo", grpo / "metrics.jsonl", STEP, 6),
        ],
        lambda: newest(second) > 0,
    )
    seen["second"] = {
        "checkpoints": [newest(ppo), newest(grpo)],
        "gathered": [len(events(run, "gathered")) for run in (ppo, grpo)],
        "round": newest(second),
        "files": files(killed),
    }
    # While the replies of the second policy are judged.
    judged = Hold("judge", killed / "judged" / "base.json", '"rewards"', 1)
    processes += kill_once(folder, path, [judged], lambda: True)
    replies = {p.stem: json.loads(p.read_text()) for p in (killed / "judged").glob("*.json")}
    seen["third"] = {
        "judged": {name: "rewards" in one for name, one in replies.items()},
        "files": files(killed),
    }
    return Chains(finish(chain, folder, "whole"), finish(chain, folder, "killed"), seen, processes)


def test_the_kills_hit_where_they_were_meant_to(chains: Chains) -> None:
    first, second, third = (chains.seen[kill] for kill in ("first", "second", "third"))
    assert first["checkpoints"] == [4, 4]
    assert "pairs-1.jsonl" not in first["files"]
    assert second["gathered"] == [1, 1]
    # The best model so far is a checkpoint too: of step 5, in the middle of the second pass.
    assert second["checkpoints"] == [5, 5]
    assert 0 < second["round"] < ROUND_STEPS
    unfinished = {"ppo/summary.json", "grpo/summary.json", "online/round-2/summary.json"}
    assert not unfinished & second["files"]
    policies = ("base", "sft", "online", "grpo", "ppo", "ppo-step-4", "ppo-step-5")
    assert third["judged"] == {name: name == "base" for name in policies}
    assert "alignment.json" not in third["files"]


def test_what_worked_for_a_killed_command_ends_with_it(chains: Chains) -> None:
    assert len(set(chains.processes)) == 12
    assert all(gone(process) for process in chains.processes)


@pytest.mark.parametrize("run", ["sft", "ppo", "grpo", "online/round-1", "online/round-2"])
def test_a_killed_chain_ends_with_the_same_bits(chains: Chains, run: str) -> None:
    expected, resumed = (
        load_file(chain / run / "adapter" / "adapter_model.safetensors")
        for chain in (chains.whole, chains.killed)
    )
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("run", ["ppo", "grpo"])
def test_a_killed_stage_takes_the_same_rollouts_and_steps(chains: Chains, run: str) -> None:
    expected, resumed = chains.whole / run, chains.killed / run
    for kind, names in {
        "gathered": ("step", "reward", "reward_std", "length", "measured", "samples"),
        "step_done": ("step", "loss", "metrics"),
        "evaluated": ("step", "metrics"),
    }.items():
        told = [[[e[n] for n in names] for e in events(path, kind)] for path in (expected, resumed)]
        assert told[0] == told[1]
    assert [e["step"] for e in events(resumed, "gathered")] == [1, 7]


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_round_has_the_same_pairs(chains: Chains, number: int) -> None:
    expected, resumed = (
        (chain / "online" / f"pairs-{number}.jsonl").read_bytes()
        for chain in (chains.whole, chains.killed)
    )
    assert resumed == expected


def test_a_chain_killed_while_it_was_judged_comes_to_the_same_verdicts(chains: Chains) -> None:
    expected, resumed = (
        json.loads((chain / "alignment.json").read_text())
        for chain in (chains.whole, chains.killed)
    )
    for part in ("verdicts", "samples", "prompts", "judge"):
        assert resumed[part] == expected[part]
    for one, other in zip(resumed["stages"], expected["stages"], strict=True):
        for name in ("objective", "steps", "before", "after"):
            assert one[name] == other[name]
    assert (chains.killed / "report.html").is_file()
