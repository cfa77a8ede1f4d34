"""What is trained: one file a method."""

from typing import Annotated

from pydantic import Field

from tunesmith.methods.adalora import AdaLoRA
from tunesmith.methods.adapter import Adapter
from tunesmith.methods.bitfit import BitFit
from tunesmith.methods.compacter import Compacter
from tunesmith.methods.diff_pruning import DiffPruning
from tunesmith.methods.full import Full
from tunesmith.methods.ia3 import IA3
from tunesmith.methods.last_layer import LastLayer
from tunesmith.methods.llama_adapter import LlamaAdapter
from tunesmith.methods.lora import LoRA
from tunesmith.methods.mam import MAM
from tunesmith.methods.p_tuning import PTuning
from tunesmith.methods.p_tuning_v2 import PTuningV2
from tunesmith.methods.prefix_tuning import PrefixTuning
from tunesmith.methods.prompt_tuning import PromptTuning
from tunesmith.methods.reft import ReFT
from tunesmith.methods.unipelt import UniPELT
from tunesmith.methods.vera import VeRA

MethodUnion = Annotated[
    LoRA
    | Full
    | LastLayer
    | BitFit
    | IA3
    | Adapter
    | Compacter
    | DiffPruning
    | VeRA
    | AdaLoRA
    | PromptTuning
    | PTuning
    | PrefixTuning
    | PTuningV2
    | LlamaAdapter
    | ReFT
    | UniPELT
    | MAM,
    Field(discriminator="name"),
]

# TaskHead (methods/head.py) is not chosen: it comes with every method on a classifier. Nor is
# ValueHead (methods/value_head.py), which the objective ppo brings.

__all__ = [
    "IA3",
    "MAM",
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "Compacter",
    "DiffPruning",
    "Full",
    "LastLayer",
    "LlamaAdapter",
    "LoRA",
    "MethodUnion",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "ReFT",
    "UniPELT",
    "VeRA",
]
