"""Distillation on CUDA: cached against live teachers, own replies, and the operator in bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from pairs import pair_rows, write_rows
from reply_runs import events
from tiny import tiny_llama, tiny_tokenizer
from tunesmith.ops.linear_divergence import LinearHead
from tunesmith.ops.linear_divergence_top_k import TopK, linear_divergence_top_k, linear_top_k

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB, WIDTH = 1000, 64


def run_of(folder: Path, model: Path, objective: dict[str, Any], name: str) -> tunesmith.Run:
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(64)]
    path = write_rows(folder / "rows.jsonl", rows)
    teacher = folder / "teacher"
    if not teacher.exists():
        torch.manual_seed(5)
        tiny_llama(hidden_size=48, initializer_range=0.2).save_pretrained(teacher)
        tiny_tokenizer().save_pretrained(teacher)
    float32 = {"dtype": "float32"}
    return tunesmith.Run(
        name=name,
        output=str(folder / "runs"),
        model={"name": str(model)} | float32,
        method={"name": "lora", "rank": 8},
        objective={"name": "distillation", "teacher": {"name": str(teacher)} | float32} | objective,
        data={"train": [{"path": str(path)}], "holdout": 16, "max_length": 96},
        train={"max_steps": 12, "batch_size": 16, "learning_rate": 1e-2, "warmup": 0},
        evaluation={"samples": 2, "max_new_tokens": 6},
        engine={"device": "cuda", "speed": "safe"},
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_cached_teacher_of_all_tokens_teaches_what_a_live_one_does(
    folder: Path, tiny_model: Path
) -> None:
    settings = {"live": {}, "cached": {"logits": "cached", "top_k": 300}}
    losses = {}
    for name, objective in settings.items():
        made = run_of(folder, tiny_model, {"divergence": "js"} | objective, name)
        path = tunesmith.train(made).directory.path
        losses[name] = [e["loss"] for e in events(path, "step_done")]
    assert losses["cached"] == pytest.approx(losses["live"], rel=1e-3)


def test_own_replies_are_written_and_learned_from(folder: Path, tiny_model: Path) -> None:
    objective = {"on_policy": 1.0, "divergence": "reverse_kl", "sampling": {"max_new_tokens": 8}}
    result = tunesmith.train(run_of(folder, tiny_model, objective, "on_policy"))
    summary = json.loads(result.directory.summary.read_text())
    assert summary["after"]["divergence"] < summary["before"]["divergence"]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_the_operator_in_bfloat16_is_near_that_in_float64(kind: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(n, WIDTH, generator=generator) for n in (300, VOCAB, 300, VOCAB)]
    # Rounded first, so that both start from the same numbers.
    own, weight, states, other = (x.bfloat16().double() / 4 for x in drawn)
    teacher = linear_top_k(states, LinearHead(other, None), 32, vocab=VOCAB)

    def of(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = own.to(device, dtype).requires_grad_()
        known = TopK(*(part.to(device) for part in teacher))
        head = LinearHead(weight.to(device, dtype), None)
        total = linear_divergence_top_k(hidden, head, known, vocab=VOCAB, kind=kind, chunk_size=128)
        return total, torch.autograd.grad(total, hidden)[0]

    total, gradient = of(torch.bfloat16, "cuda")
    exact, expected = of(torch.float64, "cpu")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.cpu().double(), exact, rtol=2e-2, atol=0)
    difference = (gradient.cpu().double() - expected).norm() / expected.norm()
    assert difference < 3e-2  # bfloat16 has 8 bits
