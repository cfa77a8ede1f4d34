"""Tokens a second of sampling, and the time of a whole GRPO step, on one GPU at a 1B shape.

    python bench/gpu_rollout.py

Random weights of Llama-3.2-1B's shape in bfloat16 with LoRA, prompts of 64 tokens, 256 new
tokens a row, 512 and 64 rows: `rollout.sample`, beside transformers' `generate` on the plain model,
each after a warm-up. A GRPO step is what `tunesmith train` does for 512 rows: sampling, forward,
backward and update in micro-batches. Writes bench/results/gpu_rollout.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith import LoRA, attach
from tunesmith.data.collate_replies import ReplyCollator, ReplyRow, reply_row
from tunesmith.models.attention import enable_segments
from tunesmith.objectives.grpo import GRPO
from tunesmith.rollout.draw import row_seeds
from tunesmith.rollout.sample import Reply, Stops, sample

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_rollout.json"
PROMPT = 64
SHAPES = {
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 64])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[arguments.shape], max_position_embeddings=2048, pad_token_id=0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    enable_segments(model)
    found: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": arguments.shape,
        "new_tokens": arguments.tokens,
    }
    for rows in arguments.rows:
        prompts = torch.randint(5, config.vocab_size, (rows, PROMPT)).tolist()
        peer = seconds(partial(peers, model, prompts, arguments.tokens), device)
        found[f"generate_{rows}"] = round(rows * arguments.tokens / peer)
        print(json.dumps(found), flush=True)
    tuned = attach(model, LoRA(rank=16))
    for rows in arguments.rows:
        prompts = torch.randint(5, config.vocab_size, (rows, PROMPT)).tolist()
        for decoding in ("auto", "growing") if rows == min(arguments.rows) else ("auto",):
            taken = seconds(partial(ours, model, prompts, arguments.tokens, decoding), device)
            found[f"sample_{decoding}_{rows}"] = round(rows * arguments.tokens / taken)
            print(json.dumps(found), flush=True)
    rows = max(arguments.rows)
    prompts = torch.randint(5, config.vocab_size, (rows // 8, PROMPT)).tolist()
    prompts = [prompt for prompt in prompts for _ in range(8)]
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-5)

    def step() -> None:
        replies = ours(model, prompts, arguments.tokens, "auto")
        learn(model, optimizer, prompts, replies, size=arguments.micro_batch)

    found[f"grpo_step_{rows}_seconds"] = round(seconds(step, device), 2)
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    print(json.dumps(found))
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def ours(
    model: LlamaForCausalLM, prompts: list[list[int]], tokens: int, decoding: str
) -> list[Reply]:
    return sample(
        model,
        prompts,
        row_seeds(0, range(len(prompts))),
        max_new_tokens=tokens,
        stops=Stops(),
        pad_token_id=0,
        batch_size=len(prompts),
        decoding=decoding,
    )


def peers(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int) -> None:
    ids = torch.tensor(prompts, device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        top_k=0,
    )


def learn(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    prompts: list[list[int]],
    replies: list[Reply],
    *,
    size: int,
) -> None:
    """Take one GRPO step on `replies`, 8 a prompt; the reward is the share of even tokens."""
    objective = GRPO(rewards=[{"kind": "exact"}], rollout={"replies": len(replies)})
    scores = torch.tensor([sum(t % 2 == 0 for t in r.tokens) / len(r.tokens) for r in replies])
    advantages = objective.advantages(scores.view(-1, 8)).flatten()
    rows = []
    for prompt, reply, advantage in zip(prompts, replies, advantages, strict=True):
        plain = reply_row(prompt, reply.tokens)
        value = advantage.expand(plain.tokens).contiguous().numpy()
        rows.append(ReplyRow(plain.row, {"advantages": value}))
    collate = ReplyCollator(0, "free")
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size])
        on_cpu = {"cu_seq_lens_q", "cu_seq_lens_k"}
        batch = {
            key: value.to(model.device)
            if isinstance(value, torch.Tensor) and key not in on_cpu
            else value
            for key, value in batch.items()
        }
        terms = objective.loss(model, batch)
        (terms.total / len(rows)).backward()
    optimizer.step()
    optimizer.zero_grad()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of `call`, after it was called once before."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
