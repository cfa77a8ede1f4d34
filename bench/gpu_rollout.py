"""Tokens a second of sampling, and the time of a whole GRPO step, on one GPU at a 1B shape.

    python bench/gpu_rollout.py

Random weights of Llama-3.2-1B's shape in bfloat16 with LoRA, prompts of 64 tokens, 256 new
tokens a row, 512 and 64 rows: `rollout.sample`, beside transformers' `generate` on the plain model,
each after a warm-up. A GRPO step is what `tunesmith train` does for 512 rows: sampling, forward,
backward and update in micro-batches. Writes bench/results/rollout.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith import LoRA, attach
from tunesmith.data.collate_replies import ReplyCollator, ReplyRow, reply_row
from tunesmith.engine.blocks import training_blocks
from tunesmith.engine.settings import EngineSettings
from tunesmith.methods.tuned import TunedModel
from tunesmith.models.attention import enable_segments
from tunesmith.objectives.grpo import GRPO
from tunesmith.rollout.draw import row_seeds
from tunesmith.rollout.sample import Reply, Stops, sample

RESULTS = Path(__file__).resolve().parent / "results" / "rollout.json"
PROMPT = 64
WAYS = ("peer", "growing", "graph", "compiled", "grpo")
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
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["peer", "compiled", "grpo"])
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--profile", type=Path, help="write tables of kernels here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[arguments.shape], max_position_embeddings=2048, pad_token_id=0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    book = Book(arguments, device)
    if "peer" in arguments.ways:
        peers(model, prompts_of(8, config), 8)  # libraries get warm
        for rows in arguments.rows:
            call = partial(peers, model, prompts_of(rows, config), arguments.tokens)
            book.note(f"generate_{rows}", call, tokens=rows * arguments.tokens, calls=1)
    enable_segments(model)
    tuned = attach(model, LoRA(rank=16))
    for way in [way for way in ("growing", "graph", "compiled") if way in arguments.ways]:
        for rows in arguments.rows:
            prompts = prompts_of(rows, config)
            call = partial(ours, model, prompts, arguments.tokens, way)
            book.note(f"{way}_{rows}", call, tokens=rows * arguments.tokens)
            if arguments.profile:
                call = partial(ours, model, prompts, 33, way)
                profiled(call, arguments.profile / f"{way}_{rows}.txt")
    if "grpo" in arguments.ways:
        grpo(tuned, prompts_of(max(arguments.rows) // 8, config), book)


class Book:
    """What was found, written down each time, so that what is cut off leaves the rest."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "shape": arguments.shape,
            "prompt_tokens": PROMPT,
            "new_tokens": arguments.tokens,
        }

    def note(
        self, name: str, call: Callable[[], object], *, tokens: int | None = None, calls: int = 2
    ) -> None:
        """Write down what the last of some calls took, and the first with all that it compiles."""
        on_gpu, taken = self.device.type == "cuda", []
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(calls):
            started = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        self.found[f"{name}_seconds"] = round(taken[-1], 2)
        if calls > 1:
            self.found[f"{name}_first_seconds"] = round(taken[0], 2)
        if tokens is not None:
            self.found[f"{name}_tokens_per_second"] = round(tokens / taken[-1])
        if on_gpu:
            self.found[f"{name}_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        self.save()

    def save(self) -> None:
        """Write all of it."""
        print(json.dumps(self.found), flush=True)
        results: Path = self.arguments.results
        results.parent.mkdir(exist_ok=True, parents=True)
        results.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        results.with_suffix(".md").write_text(table(self.found), encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """Return what was found as a page of Markdown."""
    names = {
        "generate": "transformers' generate, no adapter",
        "growing": "growing cache, LoRA",
        "graph": "fixed cache, a step as one CUDA graph, LoRA",
        "compiled": "a step as one CUDA graph, blocks and drawing compiled, LoRA (as a run does)",
    }
    lines = [
        "# Roll-outs on one GPU",
        "",
        f"Written by `python bench/gpu_rollout.py` on {found['date']}: {found['device']}, torch "
        f"{found['torch']}, transformers {found['transformers']}.",
        f"Random weights of shape {found['shape']} in bfloat16, prompts of "
        f"{found['prompt_tokens']} tokens, {found['new_tokens']} new tokens a row, rank 16.",
        "",
        "| way | rows | tokens/s | peak GiB | first call |",
        "|---|---|---|---|---|",
    ]
    for key, rate in found.items():
        name, _, rows = key.removesuffix("_tokens_per_second").rpartition("_")
        if not key.endswith("_tokens_per_second"):
            continue
        first = found.get(f"{name}_{rows}_first_seconds")
        told = "" if first is None else f"{first:.1f} s"
        peak = found.get(f"{name}_{rows}_peak_gib", "")
        lines.append(f"| {names[name]} | {rows} | {rate:,} | {peak} | {told} |")
    if "grpo_step_seconds" in found:
        lines += [
            "",
            f"A whole GRPO step of {found['grpo_rows']} replies to {found['grpo_rows'] // 8} "
            f"prompts: {found['grpo_step_seconds']:.2f} s, of which sampling "
            f"{found['grpo_sampling_seconds']:.2f} s and learning "
            f"{found['grpo_learning_seconds']:.2f} s; peak {found.get('grpo_step_peak_gib')} GiB; "
            f"the first step, with all that is compiled, {found['grpo_step_first_seconds']:.1f} s.",
        ]
    return "\n".join(lines) + "\n"


def grpo(tuned: TunedModel, prompts: list[list[int]], book: Book) -> None:
    """Measure a step as `tunesmith train` takes it: 8 replies a prompt, blocks compiled."""
    model = tuned.model
    repeated = [prompt for prompt in prompts for _ in range(8)]
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-5)
    sizes = book.arguments

    def step() -> None:
        started = time.perf_counter()
        replies = ours(model, repeated, sizes.tokens, "compiled")
        sampled = time.perf_counter()
        learn(model, optimizer, repeated, replies, size=sizes.micro_batch)
        if book.device.type == "cuda":
            torch.cuda.synchronize()
        book.found["grpo_sampling_seconds"] = round(sampled - started, 2)
        book.found["grpo_learning_seconds"] = round(time.perf_counter() - sampled, 2)

    blocks = [model.get_submodule(block.path) for block in tuned.sites.blocks]
    settings = EngineSettings.model_validate({"checkpointing": "none"})
    book.found["grpo_rows"] = len(repeated)
    with training_blocks(model, blocks, settings, device=book.device):
        book.note("grpo_step", step)


def prompts_of(rows: int, config: LlamaConfig) -> list[list[int]]:
    return torch.randint(5, config.vocab_size, (rows, PROMPT)).tolist()


def profiled(call: Callable[[], object], path: Path) -> None:
    """Write what the kernels of `call` took."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = profile.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90
    )
    path.write_text(table, encoding="utf-8")


def ours(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int, way: str) -> list[Reply]:
    return sample(
        model,
        prompts,
        row_seeds(0, range(len(prompts))),
        max_new_tokens=tokens,
        stops=Stops(),
        pad_token_id=0,
        batch_size=len(prompts),
        decoding="growing" if way == "growing" else "auto",
        compiled=way == "compiled",
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
    model.train()
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
    model.eval()


if __name__ == "__main__":
    main()
