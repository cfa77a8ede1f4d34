"""Replies by vLLM: what it says of them is what training says, and what it is handed is the policy.

vLLM is no part of what the tests install. `make test-vllm` makes an environment that has it and
runs this file there.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from reply_runs import events, run_of
from tiny import tiny_llama, tiny_tokenizer
from tunesmith import LoRA, attach
from tunesmith.cli.plan_tables import phases_lines
from tunesmith.engine.distribution import Peers
from tunesmith.errors import DataError, SetupError, SpecError
from tunesmith.jobs.plan import plan
from tunesmith.jobs.served_policy import require_served
from tunesmith.methods.tuned import TunedModel
from tunesmith.rollout.draw import Drawing, row_seeds
from tunesmith.rollout.sample import Reply, Stops
from tunesmith.rollout.served import Served, cache_bytes, imported

Policies = dict[int, tuple[TunedModel, Path]]
CPU = torch.device("cpu")
CONTEXT, RANK = 48, 4
PROMPTS = [[5, 9, 11], [7, 30, 31, 32, 40, 41, 8], [90], [12, 13, 14, 15, 16]]
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; see make test-vllm"
)


def model_of_all() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny_llama(**SHAPE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model_of_all().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[Served]:
    config = model_of_all().config
    served = Served(base, config, dtype=torch.float32, rank=RANK, context=CONTEXT, rows=4)
    yield served
    served.close()


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return {seed: policy_of(seed, tmp_path_factory.mktemp("policy") / "lora") for seed in (1, 2)}


def policy_of(seed: int, folder: Path) -> tuple[TunedModel, Path]:
    """A LoRA that changes a lot, in the model and as it is handed over."""
    tuned = attach(model_of_all(), LoRA(rank=RANK))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save(folder)
    return tuned, folder


def written(engine: Served, policy: Path | None, **changes: Any) -> list[Reply]:
    settings: dict[str, Any] = {
        "max_new_tokens": 12,
        "stops": Stops(),
        "drawing": Drawing(),
    }
    seeds = changes.pop("seeds", row_seeds(3, range(len(PROMPTS))))
    return engine.write(policy, PROMPTS, seeds, **(settings | changes))


@torch.no_grad()
def by_training(model: torch.nn.Module, prompt: list[int], reply: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    found: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
    return found


@needs_vllm
def test_log_probabilities_are_those_of_the_model_that_trains(
    engine: Served, policies: Policies
) -> None:
    for seed in (1, 2):  # the second takes the place of the first
        tuned, policy = policies[seed]
        for prompt, reply in zip(PROMPTS, written(engine, policy), strict=True):
            found = torch.tensor(reply.log_probs)
            expected = by_training(tuned.model, prompt, reply.tokens)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            assert len(reply.tokens) == 12
            assert not reply.ended


@needs_vllm
def test_without_a_policy_the_base_writes(engine: Served, policies: Policies) -> None:
    tuned, _ = policies[1]
    with tuned.disabled():
        for prompt, reply in zip(PROMPTS, written(engine, None), strict=True):
            expected = by_training(tuned.model, prompt, reply.tokens)
            torch.testing.assert_close(torch.tensor(reply.log_probs), expected, atol=1e-5, rtol=0)


@needs_vllm
def test_a_reply_is_of_its_seed(engine: Served, policies: Policies) -> None:
    _, policy = policies[1]
    seeds = row_seeds(3, range(len(PROMPTS)))
    one, same = (written(engine, policy, seeds=seeds) for _ in range(2))
    assert one == same
    other = written(engine, policy, seeds=[seeds[0], *row_seeds(4, range(3))])
    assert other[0].tokens == one[0].tokens
    assert all(a.tokens != b.tokens for a, b in zip(other[1:], one[1:], strict=True))


@needs_vllm
def test_tokens_come_as_often_as_the_model_says(engine: Served, policies: Policies) -> None:
    tuned, policy = policies[1]
    with torch.no_grad():
        logits = tuned.model(input_ids=torch.tensor([[5, 9, 11]])).logits[0, -1]
    most = (logits / 0.5).topk(3)
    expected = most.values.softmax(0)
    drawn = engine.write(
        policy,
        [[5, 9, 11]] * 3000,
        row_seeds(0, range(3000)),
        max_new_tokens=1,
        stops=Stops(),
        drawing=Drawing(temperature=0.5, top_k=3),
    )
    counts = torch.zeros(3)
    for reply in drawn:
        counts[most.indices.tolist().index(reply.tokens[0])] += 1
    torch.testing.assert_close(counts / 3000, expected, atol=0.03, rtol=0)


@needs_vllm
def test_the_most_likely_tokens_are_those_of_the_model(engine: Served, policies: Policies) -> None:
    tuned, policy = policies[2]
    for prompt, reply in zip(PROMPTS, written(engine, policy, drawing=Drawing(0.0)), strict=True):
        with torch.no_grad():
            logits = tuned.model(input_ids=torch.tensor([prompt + reply.tokens])).logits[0]
        assert reply.tokens == logits.argmax(-1)[len(prompt) - 1 : -1].tolist()


@needs_vllm
def test_tokens_and_texts_end_a_reply(engine: Served, policies: Policies) -> None:
    _, policy = policies[1]
    whole = written(engine, policy)
    ending = whole[1].tokens[4]
    by_token = written(engine, policy, stops=Stops(frozenset({ending})))[1]
    place = whole[1].tokens.index(ending) + 1
    assert by_token.tokens == whole[1].tokens[:place]
    assert len(by_token.log_probs) == place
    assert by_token.ended
    said = Stops(strings=(f" {ending} ",), text=lambda ids: "".join(f" {i} " for i in ids))
    assert written(engine, policy, stops=said)[1] == by_token


@needs_vllm
def test_a_reply_near_the_contexts_end_is_shorter(engine: Served, policies: Policies) -> None:
    _, policy = policies[1]
    long = [list(range(3, 3 + CONTEXT - 2)), [5, 9, 11]]
    settings: dict[str, Any] = {"stops": Stops(), "drawing": Drawing(), "max_new_tokens": 6}
    replies = engine.write(policy, long, [1, 2], **settings)
    assert [len(reply.tokens) for reply in replies] == [2, 6]
    with pytest.raises(DataError, match="prompt 0"):
        engine.write(policy, [[3] * CONTEXT], [1], **settings)
    assert engine.write(policy, [], [], **settings) == []


@needs_vllm
@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_a_run_learns_from_what_vllm_wrote(tmp_path: Path, base: Path, objective: str) -> None:
    run = run_of(
        tmp_path,
        base,
        objective={"rollout": {"replies": 12, "max_new_tokens": 6, "decoding": "vllm"}},
    )
    given = json.loads(run.model_dump_json())
    if objective == "ppo":
        keep = ("rewards", "rollout", "epochs", "kl")
        given["objective"] = {k: v for k, v in given["objective"].items() if k in keep}
        given["objective"]["name"] = "ppo"
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(given))
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "train", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    directory = tmp_path / "runs" / "job"
    summary = json.loads((directory / "summary.json").read_text())
    proofs = {proof["name"]: proof for proof in summary["proofs"]}
    assert "allowed: 0.0001" in proofs["sampling agrees with training"]["detail"]
    assert all(proof["passed"] for proof in proofs.values())
    first, second = (event["measured"] for event in events(directory, "gathered"))
    assert max(first["log_prob_gap"], second["log_prob_gap"]) < 1e-5
    # What the second roll-out was written with is no longer the base.
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "ia3"}}, "takes over lora alone, and the run has ia3"),
        ({"method": {"name": "lora", "dora": True}}, "plain lora"),
        ({"method": {"name": "lora", "init": "pissa"}}, "kaiming or gaussian"),
        ({"model": {"quantize": "fp8"}}, "model.quantize is fp8"),
        ({"model": {"adapter": "runs/sft/adapter"}}, "merge model.adapter into the base first"),
    ],
)
def test_what_cannot_be_handed_over_is_told(
    tmp_path: Path, base: Path, changes: dict[str, Any], said: str
) -> None:
    run = run_of(tmp_path, base, objective={"rollout": {"decoding": "vllm"}})
    given = json.loads(run.model_dump_json())
    for key, value in changes.items():
        given[key] = value if key == "method" else given[key] | value
    with pytest.raises(SpecError, match=said):
        require_served(type(run)(**given), Peers(CPU))


def test_a_machine_without_vllm_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SetupError, match=r"pip install 'tunesmith\[vllm\]'"):
        imported()


def test_a_plan_counts_the_second_copy_and_its_cache(tmp_path: Path, base: Path) -> None:
    changes = {"rollout": {"replies": 12, "max_new_tokens": 6, "batch_size": 12}}
    plain = run_of(tmp_path, base, objective=changes)
    served = run_of(
        tmp_path, base, objective={"rollout": changes["rollout"] | {"decoding": "vllm"}}
    )
    without, with_vllm = (plan(run, device="cuda") for run in (plain, served))
    config = tiny_llama(**SHAPE).config
    # 2 layers of keys and values, 1 head of 64, float32; a page more than 64 tokens, 12 rows.
    assert cache_bytes(config, torch.float32, 12, 64) == 2 * 2 * 64 * 4 * 12 * (64 + 128)
    more = with_vllm.alone.beside - without.alone.beside
    assert more == with_vllm.alone.frozen + 2 * 2 * 64 * 4 * 12 * (64 + 128)
    assert with_vllm.alone.rollout == 0
    said = " ".join(phases_lines(with_vllm))
    assert "12 replies of 6 tokens at once to prompts of 58. decoding: vllm: its copy" in said
    assert "keys and values, and" in " ".join(phases_lines(without))
