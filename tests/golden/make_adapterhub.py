"""Write golden values of AdapterHub's `adapters` package into tests/golden/adapterhub.

It needs an environment of its own, because `adapters` wants an older transformers:

    python -m venv /somewhere/adapterhub
    /somewhere/adapterhub/bin/pip install adapters==1.3.0 'transformers~=4.57.6' torch==2.13.0
    /somewhere/adapterhub/bin/python tests/golden/make_adapterhub.py

For every model: base/<model>/ as transformers saves it. For every adapter: <model>-<adapter>/ as
`adapters` saves it, and outcome.safetensors with input_ids, logits, and for every weight of the
adapter `gradient.<name>` of mean(position * logsumexp(logits)), positions from 1.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import (
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

HERE = Path(__file__).resolve().parent / "adapterhub"
IDS = torch.tensor([[5, 9, 31, 17, 4, 22], [8, 3, 12, 29, 7, 11]])
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 2,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (BertForMaskedLM, BertConfig(**SIZES, **STILL)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=32,
            n_inner=24,
            initializer_range=0.2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    ),
}
GATED = {"use_gating": True}
ADAPTERS: dict[str, Any] = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": SeqBnConfig(reduction_factor=4),
    "parallel": ParBnConfig(reduction_factor=4),
    "compacter": CompacterConfig(reduction_factor=2),
    "compacter-pp": CompacterPlusPlusConfig(reduction_factor=2),
    "prefix": PrefixTuningConfig(flat=True, prefix_length=3),
    "prefix-mlp": PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
    "lora": LoRAConfig(r=2, alpha=4),
    "lora-all": LoRAConfig(
        r=2, alpha=4, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    ),
    "ia3": IA3Config(),
    "unipelt": ConfigUnion(
        LoRAConfig(r=2, alpha=4, **GATED),
        PrefixTuningConfig(flat=True, prefix_length=3, **GATED),
        SeqBnConfig(reduction_factor=4, original_ln_before=False, **GATED),
    ),
}

WANTED = {
    "bert": [x for x in ADAPTERS if x != "lora"],
    "llama": [
        "houlsby",
        "pfeiffer",
        "parallel",
        "compacter-pp",
        "prefix",
        "lora-all",
        "ia3",
    ],
    "gpt2": ["houlsby", "lora", "lora-all", "ia3", "prefix"],
}
"""Every adapter on BERT, and elsewhere those that are put together in another way."""


def randomise(parameters: list[torch.nn.Parameter]) -> None:
    """Give what trains values as after training, so that every part of it shows in the logits."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def make(model_name: str, adapter: str) -> None:
    kind, _ = MODELS[model_name]
    # A relative name says nothing of the machine. Eager, because with sdpa and a prefix `adapters`
    # leaves the mask to is_causal, which hides keys that a token should see.
    model = kind.from_pretrained(f"base/{model_name}", attn_implementation="eager")
    adapters.init(model)
    torch.manual_seed(1)
    model.add_adapter("golden", config=ADAPTERS[adapter])
    model.train_adapter("golden")
    model.eval()
    # BERT's head would train as well
    trained = {name: p for name, p in model.named_parameters() if ".golden." in name}
    randomise(list(trained.values()))
    # the gates of UniPELT are means over the sequence there, so one of one token
    ids = IDS[:, :1] if adapter == "unipelt" else IDS
    model.set_active_adapters(None)
    base = model(ids).logits
    model.set_active_adapters("golden")
    logits = model(ids).logits
    assert not torch.equal(logits, base), "the adapter does nothing"
    (logits.logsumexp(-1) * torch.arange(1, ids.shape[1] + 1)).mean().backward()
    directory = HERE / f"{model_name}-{adapter}"
    # a prefix is in every layer and in their pool, which safetensors does not take
    prefixed = "prefix" in adapter or adapter == "unipelt"
    model.save_adapter(str(directory), "golden", with_head=False, use_safetensors=not prefixed)
    outcome = {"input_ids": ids, "logits": logits.detach()}
    outcome |= {f"gradient.{n}": p.grad for n, p in trained.items() if p.grad is not None}
    save_file({n: t.contiguous() for n, t in outcome.items()}, directory / "outcome.safetensors")


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    os.chdir(HERE)
    for name, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        kind(config).save_pretrained(HERE / "base" / name)
        for adapter in WANTED[name]:
            make(name, adapter)


if __name__ == "__main__":
    main()
