"""The same job by other programs, one process each: trl, trl-liger, unsloth.

    python bench/gpu_peers.py trl-liger --model 8b --mode lora --gc 0

Prints a line `RESULT {...}` with the same keys as gpu_sft.py. A program that is not installed is
told so. The model is made once, with random weights, in a folder of the temporary directory.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()
WARMUP = 3
LENGTHS = Path(__file__).with_name("alpaca_lengths.json")
NEEDED = {
    "trl": ("trl", "peft", "datasets"),
    "trl-liger": ("trl", "peft", "datasets", "liger_kernel"),
    "unsloth": ("unsloth", "trl", "peft", "datasets"),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> None:
    arguments = parse()
    needed = NEEDED[arguments.peer]
    if arguments.mode == "qlora":
        needed += ("bitsandbytes",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print("RESULT " + json.dumps({"failed": f"not installed: {', '.join(missing)}"}))
        return
    if arguments.peer == "unsloth":
        import unsloth  # noqa: F401 - it patches what is imported after it
    random_weights = arguments.load == "memory" and by_constructor(arguments)
    directory = made(arguments.model, weights=not random_weights)
    print("RESULT " + json.dumps(measure(arguments, directory)), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=tuple(NEEDED))
    parser.add_argument("--model", default="8b", choices=("8b", "1b", "tiny"))
    parser.add_argument("--mode", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--gc", type=int, default=1, help="gradient checkpointing")
    parser.add_argument("--dora", type=int, default=0)
    parser.add_argument("--data", default="full", choices=("full", "alpaca"))
    parser.add_argument("--packing", type=int, default=0, help="TRL's packing, samples kept apart")
    parser.add_argument("--group", type=int, default=0, help="batches of like lengths")
    parser.add_argument(
        "--load", default="memory", choices=("memory", "disk"), help="where the weights come from"
    )
    parser.add_argument("--bs", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    return parser.parse_args()


def by_constructor(arguments: argparse.Namespace) -> bool:
    """Return whether the model can be made on the device instead of being read."""
    return arguments.peer != "unsloth" and arguments.mode != "qlora"


def made(model: str, *, weights: bool = True) -> Path:
    """Return the folder of a tokenizer and a model with random weights, made where it is not.

    Args:
        model: name of its shape.
        weights: whether they are needed; the configuration is there in any case.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from gpu_job import llama_config, random_llama

    folder = Path(tempfile.gettempdir()) / f"bench-model-{model}{'' if weights else '-empty'}"
    if (folder / "done").exists():
        return folder
    if weights:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        random_llama(model, device, torch.bfloat16).save_pretrained(folder)
        torch.cuda.empty_cache()
    else:
        llama_config(model).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        letter: number for number, letter in enumerate(["<s>", "</s>", "<pad>", *letters])
    }
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    (folder / "done").write_text("")
    return folder


def rows(arguments: argparse.Namespace, vocab: int) -> list[dict[str, list[int]]]:
    """Return the rows: full, or with the lengths of real ones, loss on the reply only."""
    import numpy as np

    random = np.random.default_rng(0)
    # A packed row holds many, and like lengths need many to choose from.
    many = 40 if arguments.packing else 8 if arguments.group else 1
    count = many * arguments.bs * (arguments.steps + WARMUP + 2)
    lengths = [(0, arguments.seq)] * count
    if arguments.data == "alpaca":
        lengths = json.loads(LENGTHS.read_text(encoding="utf-8"))["lengths"]
        lengths = (lengths * (1 + count // len(lengths)))[:count]
    found = []
    for prompt, reply in lengths:
        ids = random.integers(3, vocab, prompt + reply).tolist()
        labels = [-100] * prompt + ids[prompt:]
        found.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return found


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Train and return what was measured."""
    import psutil
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    vocab = AutoConfig.from_pretrained(directory).vocab_size
    data = rows(arguments, vocab)
    ends: list[float] = []
    first: list[float] = []
    seen: list[tuple[int, int]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())
            if len(ends) == 1:
                first.append(time.perf_counter() - BEGUN)
                first.append(time.time() - psutil.Process().create_time())
            if len(ends) == WARMUP:
                torch.cuda.reset_peak_memory_stats()

    model, peft_config = load(arguments, directory)
    trainer = SFTTrainer(
        model=model,
        args=configured(arguments),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(directory),
        callbacks=[Clock()],
        **({"peft_config": peft_config} if peft_config else {}),
    )
    inner = trainer.training_step

    def training_step(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        mask = inputs.get("attention_mask", inputs["input_ids"] >= 0)
        supervised = (inputs["labels"][:, 1:] != -100).sum()
        seen.append((int(mask.sum()), int(supervised)))
        return inner(model, inputs, *rest, **more)

    trainer.training_step = training_step
    trainer.train()
    seconds = [b - a for a, b in zip(ends[WARMUP - 1 :], ends[WARMUP:], strict=False)]
    step = statistics.median(seconds)
    # Batches differ in size where rows do, so there the rate is over all steps.
    timed = [sum(sizes) / sum(seconds) for sizes in zip(*seen[WARMUP:], strict=True)]
    if arguments.data == "full":
        timed = [size / step for size in seen[-1]]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "tokens_per_second": round(timed[0], 1),
        "supervised_tokens_per_second": round(timed[1], 1),
        "step_seconds": round(step, 4),
        "steps_seconds": [round(x, 4) for x in seconds],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "first_step_seconds": round(first[0], 2),
        "start_seconds": round(first[1], 2),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def configured(arguments: argparse.Namespace) -> Any:
    """Return TRL's settings of the job."""
    from trl import SFTConfig

    its_own = arguments.peer == "unsloth"
    return SFTConfig(
        output_dir=os.path.join(tempfile.gettempdir(), "bench-peer"),
        per_device_train_batch_size=arguments.bs,
        max_steps=arguments.steps + WARMUP,
        logging_steps=1,
        bf16=True,
        report_to="none",
        save_strategy="no",
        optim="adamw_torch_fused",
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_length=arguments.seq,
        packing=bool(arguments.packing),
        dataset_kwargs={"skip_prepare_dataset": not arguments.packing},
        remove_unused_columns=False,
        **({"train_sampling_strategy": "group_by_length"} if arguments.group else {}),
        **{}
        if its_own
        else {
            "gradient_checkpointing": bool(arguments.gc),
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "use_liger_kernel": arguments.peer == "trl-liger",
        },
    )


def load(arguments: argparse.Namespace, directory: Path) -> tuple[Any, Any]:
    """Return the model, and PEFT's settings where the trainer takes them."""
    import torch

    if arguments.peer == "unsloth":
        return by_unsloth(arguments, directory), None
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    more = {}
    if arguments.mode == "qlora":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if arguments.load == "memory" and by_constructor(arguments):
        from gpu_job import random_llama

        model = random_llama(arguments.model, torch.device("cuda"), torch.bfloat16)
        model.name_or_path = str(directory)  # the trainer takes it for the tokenizer's
    else:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0}, **more
        )
    if arguments.mode == "full":
        return model, None
    return model, LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        use_dora=bool(arguments.dora),
    )


def by_unsloth(arguments: argparse.Namespace, directory: Path) -> Any:
    """Return the model as unsloth prepares it."""
    import torch
    from unsloth import FastLanguageModel

    full = arguments.mode == "full"
    model, _ = FastLanguageModel.from_pretrained(
        str(directory),
        max_seq_length=arguments.seq,
        dtype=torch.bfloat16,
        load_in_4bit=arguments.mode == "qlora",
        full_finetuning=full,
    )
    if full:
        return model
    return FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if arguments.gc else False,
        random_state=0,
    )


if __name__ == "__main__":
    main()
