"""Does a model's block, with a method in it, compile as one graph?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError

from tunesmith.engine.blocks import training_blocks
from tunesmith.engine.settings import EngineSettings
from tunesmith.errors import SpecError
from tunesmith.methods import MethodUnion
from tunesmith.methods.tuned import attach
from tunesmith.models.attention import enable_segments
from tunesmith.models.loading import load_model
from tunesmith.types import Proof

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Method
    from tunesmith.methods.tuned import TunedModel

TOKENS = 32


def method_named(name: str) -> Method:
    """Return the method of this name with its defaults.

    Raises:
        SpecError: there is none.
    """
    known: TypeAdapter[Any] = TypeAdapter(MethodUnion)
    try:
        method: Method = known.validate_python({"name": name})
    except ValidationError as error:
        raise SpecError(
            f"--method: {name!r} is no method that works by its name alone; `tunesmith models` and "
            "the documentation list them"
        ) from error
    return method


def graph_checks(name: str, method: str, device: torch.device) -> list[Proof]:
    """Return for each kind of block whether it is one graph with the method, and if not why not.

    Args:
        name: path, zoo name or Hub id of the model.
        method: name of the method, with its defaults.
        device: where to load it.

    Raises:
        TunesmithError: the model cannot be loaded, or the method cannot work on it.
    """
    chosen = method_named(method)
    model = load_model(name, device=device).model
    inputs = _inputs(model)
    tuned = attach(model, chosen)
    return [_check(kind, method, failed) for kind, failed in _captured(tuned, inputs).items()]


def _check(kind: tuple[str, int], method: str, failed: Mapping[str, str]) -> Proof:
    name, count = kind
    title = f"one graph: {count} x {name} with {method}"
    if not failed:
        return Proof(title, True, "every block compiles whole")
    path, reason = next(iter(failed.items()))
    return Proof(title, False, f"{len(failed)} run uncompiled, the first is {path}: {reason}")


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a training step calls the model with: segments side by side where it can."""
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(TOKENS, device=model.device)[None] % vocab
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    if not enable_segments(model):
        return {"input_ids": ids}
    bounds = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)
    longest = TOKENS // 2
    return {
        "input_ids": ids,
        "position_ids": torch.arange(TOKENS, device=model.device)[None] % longest,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _captured(tuned: TunedModel, inputs: dict[str, Any]) -> dict[tuple[str, int], dict[str, str]]:
    """Return by kind of block, with their number, the paths that failed and why."""
    model = tuned.model.train()
    paths = [block.path for block in tuned.sites.blocks]
    blocks = [model.get_submodule(path) for path in paths]
    settings = EngineSettings(speed="compiled", checkpointing="none")
    # "eager" captures the graph and leaves it as it is: what breaks it is known in seconds.
    with training_blocks(model, blocks, settings, device=model.device, backend="eager") as training:
        model(**inputs, use_cache=False)
        failed = training.failed
    kinds = [type(block).__name__ for block in blocks]
    return {
        (kind, kinds.count(kind)): {
            path: failed[path]
            for path, own in zip(paths, kinds, strict=True)
            if own == kind and path in failed
        }
        for kind in dict.fromkeys(kinds)
    }
