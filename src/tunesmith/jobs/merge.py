"""From a run to a plain transformers directory."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.errors import AdapterError, SpecError
from tunesmith.jobs.assemble import choose_dtypes
from tunesmith.jobs.labelled import classifies, head_of_run
from tunesmith.jobs.proofs import merged_agrees, require, same_template
from tunesmith.jobs.proofs_labels import same_tokens
from tunesmith.jobs.result import load_run
from tunesmith.jobs.summary import weights_bytes
from tunesmith.methods.child import base_modules
from tunesmith.models.loading import load_model
from tunesmith.models.precision import DTYPES
from tunesmith.models.quantize import bytes_in_memory, dequantise
from tunesmith.types import Proof

if TYPE_CHECKING:
    from tunesmith.jobs.result import LoadedRun

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits, relative to the largest logit, by the dtype of the weights."""
ROUNDED_INPUTS = 5e-2
"""The same for an int8 base, which rounds the inputs of its products; a plain model does not."""
PROBE = (2, 32)
"""Rows and tokens that merged and unmerged are compared on."""


def merge(path: str | Path, to: str | Path, *, dtype: str | None = None) -> list[Proof]:
    """Write the run's result, folded into the weights, as a plain transformers directory.

    Args:
        path: the run directory.
        to: the directory to write; must not exist or be empty.
        dtype: float32, bfloat16 or float16; the base model's dtype in this run where None.

    Returns:
        What was checked: merged against unmerged logits, the files read back, the template. A
        quantised base is written with the weights that its codes stand for.

    Raises:
        AdapterError: `to` is not empty.
        MethodError: the method is not linear in the weights.
        ProofError: merged and unmerged differ by more than rounding.
    """
    target = Path(to)
    if dtype is not None and dtype not in DTYPES:
        raise SpecError(f"--dtype: {dtype!r} is not allowed; use {', '.join(DTYPES)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(f"{target} exists and is not empty; choose another directory")
    overrides = [f"model.dtype={dtype}", "engine.precision=auto"] if dtype else []
    loaded = load_run(path, overrides)
    ids = _probe_ids(loaded)
    # Not what is trained has, which is float32 over any base: it is merged into the base's.
    tolerance = TOLERANCE[choose_dtypes(loaded.run, loaded.peers.device).weights]
    if loaded.run.model.quantize == "int8":
        tolerance = max(tolerance, ROUNDED_INPUTS)
    with ExitStack() as undo:
        if loaded.run.model.multiplies_float8:
            # Rounded inputs would hide an error of merging: both use the weights of the codes.
            undo.callback(dequantise(loaded.tuned.model))
        agrees = require([merged_agrees(loaded.tuned, ids, tolerance=tolerance)])
    loaded.tuned.export_model(target, loaded.tokenizer)
    written = [_written_agrees(loaded, target, ids), _template(loaded, target)]
    return require([*agrees, *_dequantised(loaded, target), *written])


def _probe_ids(loaded: LoadedRun) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocab = loaded.tuned.model.config.get_text_config().vocab_size
    return torch.randint(vocab, PROBE, generator=generator).to(loaded.peers.device)


@torch.no_grad()
def _written_agrees(loaded: LoadedRun, target: Path, ids: torch.Tensor) -> Proof:
    """The written directory, loaded as any model, gives the merged model's logits, bit for bit."""
    written = json.loads((target / "config.json").read_text(encoding="utf-8"))["dtype"]
    head = head_of_run(loaded.run)
    model = load_model(str(target), device=ids.device, dtype=DTYPES[written], head=head).model
    with loaded.tuned.merged() as merged:
        difference = (merged(ids).logits - model(ids).logits).abs().max().item()
    detail = f"largest difference of logits {difference:.2e} in {written}"
    return Proof("written directory loads equal", difference == 0, detail)


def _dequantised(loaded: LoadedRun, target: Path) -> list[Proof]:
    """Say what a quantised base became; what that cost is in the difference of logits."""
    kind = loaded.run.model.quantize
    if kind == "none":
        return []
    codes = bytes_in_memory(module for _, module in base_modules(loaded.tuned.model)) / 2**20
    plain = weights_bytes(target) / 2**20
    detail = f"{kind} codes, {codes:.1f} MiB with all the rest, became {plain:.1f} MiB of weights"
    return [Proof("base written unquantised", True, detail)]


def _template(loaded: LoadedRun, target: Path) -> Proof:
    if classifies(loaded.run):
        return same_tokens(loaded.tokenizer, target)
    return same_template(loaded.tokenizer, target)
