"""What the four roles of PPO hold on one backbone: python bench/roles_memory.py [--device cuda].

A model of SmolLM2-135M's shape with weights of no meaning, a reward run on it, and a PPO run with
that reward and a value function on an adapter of its own, which is the dearest way there is. Every
case is a process of its own that loads what it needs, uses it once on a few tokens, gives back what
was only needed for that, and tells what it still holds: policy, reference, value function and
reward model each alone, as four models would lie side by side, and all four as the PPO run holds
them. `held_bytes` is resident memory (allocated memory on CUDA) above what the same case held with
a tiny model before, so that libraries do not count; `tensor_bytes` is counted, and tells what the
base's own weights are and what is beside them. Nothing is trained here: an optimiser's state and
activations come on top, of the adapters and of the batch. Writes bench/results/roles.json; what
was measured on another device stays there.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

RESULT = Path(__file__).resolve().parent / "results" / "roles.json"
ALONE = ("reference", "policy", "value", "reward")
CASES = (*ALONE, "roles")
DTYPES = ("bfloat16", "float32")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
LORA = {"name": "lora", "rank": 16}
REPLIES, NEW_TOKENS = 4, 8
PAGE = 1024
"""Numbers of which one at least lies in every page of memory."""


class Place(NamedTuple):
    """Where models lie, and how and where they are loaded."""

    folder: Path
    dtype: str
    device: str


def main() -> None:
    arguments = parse()
    place = Place(arguments.folder, arguments.dtype, arguments.device)
    if arguments.case == "prepare":
        prepare(place)
        return
    if arguments.case is not None:
        print(json.dumps(held(arguments.case, place)))
        return
    from tunesmith.jobs.environment import hardware, package_versions

    found: dict[str, Any] = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
    devices = found.setdefault("devices", {})
    devices[arguments.device] = {
        "dtypes": {dtype: measured(dtype, arguments.device) for dtype in DTYPES},
        "hardware": hardware(),
        "versions": package_versions(),
    }
    found |= {"shape": "135M", "method": LORA}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=(*CASES, "prepare"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(dtype: str, device: str) -> dict[str, Any]:
    """Return what each case holds, and what all four roles hold beside that."""
    with tempfile.TemporaryDirectory() as folder:
        start("prepare", dtype, device, folder)
        cases = {}
        for case in CASES:
            cases[case] = json.loads(start(case, dtype, device, folder).splitlines()[-1])
            print(f"{device} {dtype} {case}: {cases[case]}", flush=True)
    roles = cases["roles"]
    beside = roles["tensor_bytes"]["beside_the_base"]
    ratios = {
        "to_one_model": roles["held_bytes"] / cases["reference"]["held_bytes"],
        "to_one_model_and_its_adapters": roles["held_bytes"]
        / (cases["reference"]["held_bytes"] + beside),
        "to_four_models": roles["held_bytes"] / sum(cases[case]["held_bytes"] for case in ALONE),
    }
    print(f"{device} {dtype}: {ratios}", flush=True)
    return {"cases": cases, "ratios": ratios}


def start(case: str, dtype: str, device: str, folder: str) -> str:
    """Do one case in a process of its own and return what it printed."""
    command = [sys.executable, __file__, "--case", case, "--dtype", dtype]
    command += ["--device", device, "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def prepare(place: Place) -> None:
    """Write for each shape a model, rows, and a reward run of one step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tunesmith

    folder = place.folder
    for shape, config in SHAPES.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config)).to(getattr(torch, place.dtype))
        model.save_pretrained(folder / shape)
        tokenizer().save_pretrained(folder / shape)
        pairs = [
            {"prompt": f"Say {n}", "chosen": "yes", "rejected": "n" + "o" * n} for n in range(1, 9)
        ]
        rows = folder / f"{shape}.jsonl"
        rows.write_text("\n".join(json.dumps(row) for row in pairs))
        tunesmith.train(run_of(shape, {"name": "reward"}, place))


def tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<|im_start|>", "<|im_end|>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>"
    )


def run_of(shape: str, objective: dict[str, Any], place: Place) -> Any:
    """Return a run on the model of a shape."""
    from tunesmith.spec import validate

    folder = place.folder
    values = {
        "name": f"{shape}-{objective['name']}",
        "output": str(folder / "runs"),
        "model": {"name": str(folder / shape), "dtype": place.dtype, "chat_template": "chatml"},
        "method": LORA,
        "objective": objective,
        "data": {"train": [{"path": str(folder / f"{shape}.jsonl")}], "max_length": 64},
        "train": {"max_steps": 1, "batch_size": REPLIES},
        "evaluation": {"samples": 0},
        "engine": {"device": place.device, "checkpointing": "none"},
    }
    return validate(values, source="roles_memory.py", lines={})


def held(case: str, place: Place) -> dict[str, Any]:
    """Return what a case holds in bytes, having been done with a tiny model before."""
    import torch

    from tunesmith.engine.memory import memory_now
    from tunesmith.methods.child import base_parameters

    device = torch.device(place.device)
    hold(case, "tiny", place)
    settle(device)
    before = memory_now(device)
    model, _acting = hold(case, "135M", place)
    settle(device)
    base = sum(parameter.nbytes for parameter in base_parameters(model).values())
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {
        "held_bytes": memory_now(device) - before,
        "tensor_bytes": {"base": base, "beside_the_base": sum(tensors.values()) - base},
    }


def settle(device: Any) -> None:
    """Give back what nobody holds any more."""
    import torch

    from tunesmith.measure.process_heap import give_back

    gc.collect()
    give_back()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def hold(case: str, shape: str, place: Place) -> tuple[Any, Any]:
    """Return the model of a case, used once, and what has to stay for it to act."""
    import torch

    from tunesmith.jobs.result import load_run
    from tunesmith.methods import LoRA
    from tunesmith.methods.tuned import attach
    from tunesmith.methods.value_head import ValueHead
    from tunesmith.models.loading import load_model

    if case == "roles":
        return four_roles(shape, place)
    if case == "reward":
        acting = load_run(place.folder / "runs" / f"{shape}-reward").tuned
        model = acting.model
    else:
        dtype = getattr(torch, place.dtype)
        model = load_model(str(place.folder / shape), device=place.device, dtype=dtype).model
        acting = attach(model, LoRA(rank=LORA["rank"])) if case != "reference" else None
        if case == "value":
            attach(acting, ValueHead(), name="value")
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + NEW_TOKENS, device=model.device)[None])
        # A model on a CPU is a window on its file, page by page, until all of it is read; a reward
        # model reads no more of the embedding than it is given tokens.
        for parameter in model.parameters():
            parameter.flatten()[::PAGE].sum()
    return model, acting


def four_roles(shape: str, place: Place) -> tuple[Any, Any]:
    """Return a PPO run as it stands before its first step, with a roll-out that asked all roles."""
    from tunesmith.engine.distribution import connect
    from tunesmith.jobs.assemble import assemble
    from tunesmith.jobs.examine_replies import ReplyExaminer
    from tunesmith.jobs.experience import Experience

    objective = {
        "name": "ppo",
        "value": "adapter",
        "rewards": [{"kind": "run", "path": str(place.folder / "runs" / f"{shape}-reward")}],
        "rollout": {"replies": REPLIES, "max_new_tokens": NEW_TOKENS},
    }
    run = run_of(shape, objective, place).resolved()
    peers = connect(run.engine)
    assembled = assemble(run, peers, lambda _: None)
    examiner = ReplyExaminer(assembled, peers)
    Experience(assembled, peers, examiner.reward).take(REPLIES)
    return assembled.tuned.model, examiner


if __name__ == "__main__":
    main()
