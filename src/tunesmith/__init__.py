"""Tunesmith: every way to fine-tune a language model, with proofs that the run is right.

The names below are imported when they are first used, so `import tunesmith` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tunesmith._version import __version__

if TYPE_CHECKING:
    from tunesmith.data.settings import DataSettings, Source
    from tunesmith.engine.settings import (
        CheckpointSettings,
        EngineSettings,
        EvaluationSettings,
        TrackingSettings,
        TrainSettings,
    )
    from tunesmith.errors import TunesmithError
    from tunesmith.jobs.evaluate import evaluate
    from tunesmith.jobs.result import load_run
    from tunesmith.jobs.train import train
    from tunesmith.methods import (
        IA3,
        MAM,
        AdaLoRA,
        Adapter,
        BitFit,
        Compacter,
        DiffPruning,
        Full,
        LastLayer,
        LlamaAdapter,
        LoRA,
        PrefixTuning,
        PromptTuning,
        PTuning,
        PTuningV2,
        ReFT,
        UniPELT,
        VeRA,
    )
    from tunesmith.methods.storage import load_adapter
    from tunesmith.methods.tuned import TunedModel, attach
    from tunesmith.models.heads import Head
    from tunesmith.models.loading import load_model
    from tunesmith.models.settings import ModelSettings
    from tunesmith.objectives import (
        SFT,
        Classification,
        Distillation,
        Preference,
        Reward,
        TokenClassification,
    )
    from tunesmith.spec import Run

_WHERE = {
    "IA3": "tunesmith.methods",
    "AdaLoRA": "tunesmith.methods",
    "Adapter": "tunesmith.methods",
    "BitFit": "tunesmith.methods",
    "Compacter": "tunesmith.methods",
    "DiffPruning": "tunesmith.methods",
    "LlamaAdapter": "tunesmith.methods",
    "PTuning": "tunesmith.methods",
    "PTuningV2": "tunesmith.methods",
    "PrefixTuning": "tunesmith.methods",
    "PromptTuning": "tunesmith.methods",
    "ReFT": "tunesmith.methods",
    "MAM": "tunesmith.methods",
    "UniPELT": "tunesmith.methods",
    "VeRA": "tunesmith.methods",
    "Classification": "tunesmith.objectives",
    "Head": "tunesmith.models.heads",
    "Distillation": "tunesmith.objectives",
    "Preference": "tunesmith.objectives",
    "Reward": "tunesmith.objectives",
    "SFT": "tunesmith.objectives",
    "TokenClassification": "tunesmith.objectives",
    "CheckpointSettings": "tunesmith.engine.settings",
    "DataSettings": "tunesmith.data.settings",
    "EngineSettings": "tunesmith.engine.settings",
    "EvaluationSettings": "tunesmith.engine.settings",
    "Full": "tunesmith.methods",
    "LastLayer": "tunesmith.methods",
    "LoRA": "tunesmith.methods",
    "ModelSettings": "tunesmith.models.settings",
    "Run": "tunesmith.spec",
    "Source": "tunesmith.data.settings",
    "TrackingSettings": "tunesmith.engine.settings",
    "TrainSettings": "tunesmith.engine.settings",
    "TunedModel": "tunesmith.methods.tuned",
    "TunesmithError": "tunesmith.errors",
    "attach": "tunesmith.methods.tuned",
    "evaluate": "tunesmith.jobs.evaluate",
    "load_adapter": "tunesmith.methods.storage",
    "load_model": "tunesmith.models.loading",
    "load_run": "tunesmith.jobs.result",
    "train": "tunesmith.jobs.train",
}

__all__ = [
    "IA3",
    "MAM",
    "SFT",
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "CheckpointSettings",
    "Classification",
    "Compacter",
    "DataSettings",
    "DiffPruning",
    "Distillation",
    "EngineSettings",
    "EvaluationSettings",
    "Full",
    "Head",
    "LastLayer",
    "LlamaAdapter",
    "LoRA",
    "ModelSettings",
    "PTuning",
    "PTuningV2",
    "Preference",
    "PrefixTuning",
    "PromptTuning",
    "ReFT",
    "Reward",
    "Run",
    "Source",
    "TokenClassification",
    "TrackingSettings",
    "TrainSettings",
    "TunedModel",
    "TunesmithError",
    "UniPELT",
    "VeRA",
    "__version__",
    "attach",
    "evaluate",
    "load_adapter",
    "load_model",
    "load_run",
    "train",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
