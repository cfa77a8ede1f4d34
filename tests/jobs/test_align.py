"""Chains of alignment: what a file may say, resuming after a kill, and judging what came out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny import tiny_tokenizer
from tunesmith.data.settings import Source
from tunesmith.errors import SpecError, TrainingError
from tunesmith.jobs.align import align, judging_of
from tunesmith.jobs.align_judge import Policy, verdict_of, win_rate
from tunesmith.jobs.align_online import best_and_worst
from tunesmith.jobs.align_replies import JudgedPrompt, held_out_prompts, seeds_of
from tunesmith.jobs.align_spec import load_alignment, merged
from tunesmith.report.alignment import charts, render, sentences

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def chain(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """SFT, then DPO from it, on tiny rows and a tiny model."""
    rows = [
        {
            "instruction": f"Say {n}",
            "input": "",
            "output": "yes" * (1 + n % 3),
            "chosen": "yes please" * (1 + n % 2),
            "rejected": "no" * (1 + n % 4),
        }
        for n in range(24)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return {
        "name": "chain",
        "output": str(tmp_path / "runs"),
        "common": {
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "data": {"train": [{"path": str(tmp_path / "rows.json")}], "max_length": 96},
            "train": {"max_steps": 4, "batch_size": 4},
            "evaluation": {"samples": 0},
            "checkpoint": {"every_steps": 2, "keep": 4},
            # Stages run in processes of their own, where PyTorch would take every core; sums in
            # another order have other last bits.
            "engine": {"device": "cpu", "threads": 1},
        },
        "stages": [
            {"name": "sft"},
            {"name": "dpo", "from": "sft", "run": {"objective": {"name": "dpo"}}},
        ],
    }


def written(chain: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(chain))
    return path


def test_a_chain_runs_each_stage_once_and_judges_its_policies(
    chain: dict[str, Any], tmp_path: Path
) -> None:
    chain["judge"] = [{"kind": "length", "free": 0, "limit": 50, "unit": "characters"}]
    chain["judged"] = {
        "prompts": chain["common"]["data"]["train"],
        "limit": 5,
        "max_new_tokens": 6,
        "points": 1,
        "samples": 2,
    }
    path = written(chain, tmp_path)
    said: list[str] = []
    found = align(load_alignment(path), str(path), said.append)
    assert [stage["objective"] for stage in found["stages"]] == ["sft", "dpo"]
    names = [verdict["name"] for verdict in found["verdicts"]]
    assert names == ["base", "sft", "dpo", "dpo-step-2"]
    base, sft, dpo, middle = found["verdicts"]
    assert base["kl"] is None
    assert set(dpo["won"]) == {"base", "sft"}
    assert middle["won"] == {}
    assert base["prefers"] is None  # it started from nothing
    assert 0 <= dpo["prefers_low"] <= dpo["prefers"] <= dpo["prefers_high"] <= 1
    assert all(0 <= v["likelier"] <= 1 for v in (base, sft, dpo, middle))
    assert found["prompts"] == 5
    assert -1 <= sft["low"] <= sft["reward"] <= sft["high"] <= 0
    page = (tmp_path / "runs" / "chain" / "report.html").read_text()
    assert "Over-optimisation" in page
    # The DPO run starts from the tuned model and not from the base.
    run = yaml.safe_load((tmp_path / "runs" / "chain" / "dpo" / "run.yaml").read_text())
    assert run["model"]["adapter"].endswith("sft/adapter")

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("summary.json")}
    again: list[str] = []
    assert align(load_alignment(path), str(path), again.append)["verdicts"] == found["verdicts"]
    assert again[:2] == ["sft: finished before", "dpo: finished before"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("summary.json")} == before

    folder = tmp_path / "runs" / "chain" / "judged"
    asked = {p: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    chain["judged"] |= {"policies": ["dpo"], "points": 0, "samples": 1}
    align(load_alignment(written(chain, tmp_path)), str(path), again.append)
    assert asked == {p: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    chain["judged"]["temperature"] = 0.1
    align(load_alignment(written(chain, tmp_path)), str(path), again.append)
    assert asked[folder / "dpo.json"] < (folder / "dpo.json").stat().st_mtime_ns


def test_stages_that_need_nothing_of_each_other_run_at_once_and_are_all_judged(
    chain: dict[str, Any], tmp_path: Path
) -> None:
    """The stages are those of one chain; KTO does not wait for DPO, and both wait for SFT."""
    chain["stages"].append(
        {"name": "kto", "from": "sft", "run": {"objective": {"name": "dpo", "loss": "kto"}}}
    )
    chain |= {"at_once": 2, "judge": [{"kind": "length", "free": 0, "limit": 50}]}
    chain["judged"] = {
        "prompts": chain["common"]["data"]["train"],
        "limit": 4,
        "max_new_tokens": 4,
        "policies": ["dpo", "kto"],
        "points": 0,
    }
    path = written(chain, tmp_path)
    said: list[str] = []
    found = align(load_alignment(path), str(path), said.append)
    begun = [line.split(" in ")[0] for line in said if "starting" in line]
    assert begun[0] == "sft: starting"
    assert sorted(begun[1:]) == ["dpo: starting", "kto: starting"]
    won = {verdict["name"]: list(verdict["won"]) for verdict in found["verdicts"]}
    assert won == {"base": [], "sft": ["base"], "dpo": ["base", "sft"], "kto": ["base", "sft"]}


def test_no_stage_begins_after_one_that_failed(chain: dict[str, Any], tmp_path: Path) -> None:
    chain["stages"].insert(0, {"name": "bad", "run": {"data": {"train": [{"path": "nowhere"}]}}})
    path = written(chain, tmp_path)
    said: list[str] = []
    with pytest.raises(TrainingError, match="stage bad failed"):
        align(load_alignment(path), str(path), said.append)
    assert [line.split(" in ")[0] for line in said] == ["bad: starting"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_chain_killed_in_a_stage_goes_on_inside_it(
    chain: dict[str, Any], tmp_path: Path, stage: str
) -> None:
    whole = chain | {"name": "whole"}
    align(load_alignment(written(whole, tmp_path)), "whole", lambda _: None)

    path = written(chain, tmp_path)
    directory = tmp_path / "runs" / "chain"
    command = [sys.executable, "-m", "tunesmith", "align", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = directory / stage / "checkpoints" / "step-00000002"
    deadline = time.monotonic() + 240
    while not first.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert first.is_dir()
    assert not (directory / "alignment.json").exists()

    align(load_alignment(path), str(path), lambda _: None)
    for name in ("sft", "dpo"):
        (file,) = (directory / name / "adapter").rglob("*.safetensors")
        expected = load_file(str(file).replace("/chain/", "/whole/"))
        resumed = load_file(file)
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[key], expected[key]) for key in expected)


JUDGE = """
def judge(prompts, replies):
    return [VALUE for _ in replies]
"""


def test_only_what_is_missing_or_of_other_settings_is_made_again(
    chain: dict[str, Any], tmp_path: Path
) -> None:
    """A page, a judge whose file changed, and findings of a chain that was another."""
    file = tmp_path / "judge.py"
    file.write_text(JUDGE.replace("VALUE", "1.0"))
    del chain["stages"][1]
    chain["common"]["train"]["max_steps"] = 1
    chain |= {"judge": {"kind": "file", "path": str(file), "function": "judge"}}
    chain["judged"] = {"prompts": chain["common"]["data"]["train"], "limit": 2, "max_new_tokens": 3}
    path = written(chain, tmp_path)
    found = align(load_alignment(path), str(path), lambda _: None)
    assert [verdict["reward"] for verdict in found["verdicts"]] == [1.0, 1.0]
    replies = tmp_path / "runs" / "chain" / "judged" / "sft.json"
    before = json.loads(replies.read_text())

    (tmp_path / "runs" / "chain" / "sft" / "report.html").unlink()
    file.write_text(JUDGE.replace("VALUE", "2.0"))
    found = align(load_alignment(path), str(path), lambda _: None)
    assert (tmp_path / "runs" / "chain" / "sft" / "report.html").is_file()
    assert [verdict["reward"] for verdict in found["verdicts"]] == [2.0, 2.0]
    after = json.loads(replies.read_text())
    assert {n: v for n, v in after.items() if n not in {"rewards", "judged_by"}} == {
        n: v for n, v in before.items() if n not in {"rewards", "judged_by"}
    }

    chain["stages"][0]["run"] = {"data": {"train": [{"path": "nowhere"}]}}
    path = written(chain, tmp_path)
    with pytest.raises(TrainingError, match="stage sft failed"):
        align(load_alignment(path), str(path), lambda _: None)
    left = {entry.name for entry in (tmp_path / "runs" / "chain").iterdir()}
    assert not {"alignment.json", "report.html"} & left


def test_a_stage_is_run_again_when_what_it_builds_on_changed(
    chain: dict[str, Any], tmp_path: Path
) -> None:
    chain["common"]["train"]["max_steps"] = 1
    path = written(chain, tmp_path)
    align(load_alignment(path), str(path), lambda _: None)
    chain["stages"][0]["run"] = {"seed": 5}
    path = written(chain, tmp_path)
    said: list[str] = []
    align(load_alignment(path), str(path), said.append)
    assert [line.split(" in ")[0] for line in said[:2]] == ["sft: starting", "dpo: starting"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"stages": [{"name": "a", "from": "b"}, {"name": "b"}]}, "'b', which is no stage before"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "two stages are called 'a'"),
        ({"judge": "sft"}, "give both or neither"),
        ({"stages": [{"name": "a", "run": {"method": {"name": "lorra"}}}]}, "stage a: .*lorra"),
        ({"stags": []}, "stags"),
        (
            {"judge": "r", "judged": {"prompts": [{"path": "x"}], "policies": ["ppo"]}},
            "judged.policies: 'ppo' is no stage",
        ),
        (
            {
                "judge": "r",
                "judged": {"prompts": [{"path": "x"}]},
                "stages": [
                    {"name": "r"},
                    {
                        "name": "p",
                        "run": {
                            "objective": {
                                "name": "grpo",
                                "rewards": [{"kind": "run", "path": "${r.directory}"}],
                            }
                        },
                    },
                ],
            },
            "is a reward that a stage is trained against",
        ),
    ],
)
def test_what_no_chain_can_mean_is_refused(
    chain: dict[str, Any], tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    path = written(chain | change, tmp_path)
    with pytest.raises(SpecError, match=why):
        load_alignment(path)


def test_stages_name_each_others_outputs(chain: dict[str, Any], tmp_path: Path) -> None:
    chain["stages"] += [
        {
            "name": "more",
            "from": "dpo",
            "run": {"data": {"train": [{"path": "${dpo.directory}/x"}]}},
        }
    ]
    alignment = load_alignment(written(chain, tmp_path))
    more = alignment.run_of(alignment.stage("more"), "")
    # Two adapters one on the other: the first two are merged into a model for the third stage.
    assert more.model.name == str(tmp_path / "runs" / "chain" / "dpo" / "merged")
    assert more.model.adapter is None
    assert more.data.train[0].path == str(tmp_path / "runs" / "chain" / "dpo" / "x")
    assert [name for name in ("sft", "dpo", "more") if alignment.merges(name)] == ["dpo"]


def test_rounds_need_the_stage_that_scores_them(chain: dict[str, Any], tmp_path: Path) -> None:
    online = {"rewards": [{"kind": "run", "path": "scorer"}]}
    chain["stages"][1]["online"] = online
    scorer = {"name": "scorer", "run": {"objective": {"name": "reward"}}}
    chain["stages"].insert(1, scorer)
    alignment = load_alignment(written(chain, tmp_path))
    assert alignment.needs(alignment.stage("dpo")) == ["sft", "scorer"]
    chain["stages"][1:] = reversed(chain["stages"][1:])
    with pytest.raises(SpecError, match="stage 'dpo' needs 'scorer'"):
        load_alignment(written(chain, tmp_path))


def test_what_is_common_to_all_stages_counts_as_each_ones_own(
    chain: dict[str, Any], tmp_path: Path
) -> None:
    """A reward said once for several policies is waited for, and cannot be their judge."""
    rewards = [{"kind": "run", "path": "${scorer.directory}"}]
    chain["common"]["objective"] = {"name": "grpo", "rewards": rewards}
    chain["stages"] = [
        {"name": "scorer", "run": {"objective": {"name": "reward"}}},
        {"name": "one"},
        {"name": "two", "run": {"seed": 1}},
    ]
    alignment = load_alignment(written(chain, tmp_path))
    assert [alignment.needs(stage) for stage in alignment.stages] == [[], ["scorer"], ["scorer"]]
    judge = {"judge": "scorer", "judged": {"prompts": [{"path": "x"}]}}
    with pytest.raises(SpecError, match="is a reward that a stage is trained against"):
        load_alignment(written(chain | judge, tmp_path))


def test_settings_over_others_replace_what_is_of_another_kind() -> None:
    common = {"method": {"name": "lora", "rank": 4}, "train": {"epochs": 1, "warmup": 2}}
    over = {"method": {"name": "ia3"}, "train": {"epochs": 3}}
    assert merged(common, over) == {"method": {"name": "ia3"}, "train": {"epochs": 3, "warmup": 2}}
    assert merged(common, {"method": {"rank": 8}})["method"] == {"name": "lora", "rank": 8}


def test_a_pair_is_the_best_and_the_worst_and_ties_make_none() -> None:
    asked = [JudgedPrompt(({"role": "user", "content": text},), {}, []) for text in ("p", "q")]
    pairs = best_and_worst(
        asked,
        ["aa", "a", "aaa", "b", "c", "d"],
        [True, False, True, True, False, True],
        lambda rows: [float(len(row.reply)) for row in rows],
    )
    turns = [{"role": "user", "content": "p"}]
    full = {"role": "assistant", "content": "a", "unfinished": True}
    assert pairs == [{"messages": turns, "chosen": "aaa", "rejected": full}]


def test_ties_win_half() -> None:
    assert win_rate([1, 2, 3, 4], [0, 2, 5, 1]) == pytest.approx((1 + 0.5 + 0 + 1) / 4)


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"answer": 2}, False),
        ({"completion": "2"}, False),
        ({"chosen": "yes", "rejected": "no"}, True),
    ],
    ids=str,
)
def test_rows_that_only_ask_can_be_judged_on(
    tmp_path: Path, row: dict[str, Any], pairs: bool
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"Say {n}", **row}) for n in range(3)))
    found = held_out_prompts([Source(path=str(file))], tiny_tokenizer(), 2)
    assert [one.messages[0]["content"] for one in found] == ["Say 0", "Say 1"]
    assert all((one.pair is not None) == pairs for one in found)


def test_seeds_of_rows_differ() -> None:
    assert len({*seeds_of(3, 5), *seeds_of(3, 5, first=5), *seeds_of(4, 5)}) == 15
    large = seeds_of(3_000_000_000, 5)
    assert torch.tensor(large).unique().numel() == 5


def verdict(name: str, reward: float, **more: Any) -> dict[str, Any]:
    known = {"name": name, "step": None, "reward": reward, "low": reward - 1, "high": reward + 1}
    numbers = {"kl": 2.0, "length": 10.0, "ended": 1.0, "distinct_1": 0.5, "distinct_2": 0.8}
    return known | numbers | {"self_bleu": 20.0, "won": {}} | more


def test_the_report_says_what_went_wrong() -> None:
    verdicts = [
        verdict("base", 0.0, kl=None),
        verdict("sft", 1.0, won={"base": 0.6}),
        verdict("ppo", 4.0, won={"base": 0.9, "sft": 0.8}, length=40.0, distinct_2=0.1),
        verdict("ppo-step-5", 9.0, step=5, kl=1.0),
    ]
    said = " ".join(sentences(verdicts))
    assert "80% of the held-out prompts" in said
    assert "grew from 10 to 40 tokens" in said
    assert "distinct-2 fell from 0.800 to 0.100" in said
    assert "highest at step 5 (9)" in said
    page = render(
        {
            "name": "<b>chain</b>",
            "model": "m",
            "prompts": 4,
            "stages": [],
            "verdicts": verdicts,
            "samples": [],
        }
    )
    assert "<svg" in page
    assert "&lt;b&gt;chain" in page
    assert all(f">{name}<" in page for name in ("start", "step 5", "end"))
    assert "prefers the better of a pair" not in page  # of which nothing is known here


@pytest.mark.parametrize(
    ("before", "after", "by_chance"),
    [
        # Prompts differ a lot, and each reply is better by a little: no luck.
        ([0.0, 5.0, 10.0, 15.0] * 8, [0.1, 5.1, 10.1, 15.1] * 8, False),
        # The mean before lies beside the interval of the mean after; the leads say nothing.
        ([0.0, 4.5] * 8, [3.0, 3.1] * 8, True),
    ],
)
def test_policies_are_compared_on_the_same_prompts(
    before: list[float], after: list[float], by_chance: bool
) -> None:
    replies = ["a b", "c d"] * (len(after) // 2)
    found = {"rewards": after, "replies": replies, "lengths": [2], "ended": [True]}
    dpo = verdict_of(Policy("dpo", Path()), found | {"divergences": None}, {"sft": before})
    verdicts = [
        verdict("sft", float(np.mean(before))),
        verdict("dpo", dpo.reward, low=dpo.low, high=dpo.high, won=dpo.won, ahead=dpo.ahead),
    ]
    assert ("within the interval of chance" in " ".join(sentences(verdicts))) == by_chance


def test_a_policy_whose_log_probabilities_are_not_finite_has_no_kl() -> None:
    """Its file holds null for them."""
    found = {"rewards": [1.0, 2.0], "replies": ["a", "b"], "lengths": [2], "ended": [True]}
    found |= {"divergences": [0.5, None], "gains": [1.0, None], "leads": [None, 1.0]}
    policy = verdict_of(Policy("dpo", Path()), found, {})
    assert (policy.kl, policy.prefers, policy.likelier) == (None, 0.5, 0.5)


def test_the_course_is_that_of_the_policy_whose_checkpoints_were_judged() -> None:
    verdicts = [
        verdict("base", 0.0, kl=None),
        verdict("kto", 1.0, won={"base": 0.6}, kl=3.0),
        verdict("dpo", 2.0, won={"base": 0.9}, kl=4.0),
        verdict("kto-step-5", 0.5, step=5, kl=1.0),
    ]
    (chart,) = charts(verdicts)
    assert "0 at the start and 1 at KL 3" in chart.caption


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("rlhf-*.yaml")), ids=lambda p: p.stem)
def test_every_stage_of_the_examples_is_a_run(path: Path) -> None:
    alignment = load_alignment(path)
    assert judging_of(alignment).policies[-1].name == alignment.stages[-1].name
