"""From a run to a plain transformers directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.errors import AdapterError, SpecError
from tunesmith.jobs.proofs import merged_agrees, require, same_template
from tunesmith.jobs.result import load_run
from tunesmith.models.loading import load_model
from tunesmith.models.precision import DTYPES
from tunesmith.types import Proof

if TYPE_CHECKING:
    from tunesmith.jobs.result import LoadedRun

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits, relative to the largest logit, by the dtype of the weights."""
PROBE = (2, 32)
"""Rows and tokens that merged and unmerged are compared on."""


def merge(path: str | Path, to: str | Path, *, dtype: str | None = None) -> list[Proof]:
    """Write the run's result, folded into the weights, as a plain transformers directory.

    Args:
        path: the run directory.
        to: the directory to write; must not exist or be empty.
        dtype: float32, bfloat16 or float16; the base model's dtype in this run where None.

    Returns:
        What was checked: merged against unmerged logits, the files read back, the template.

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
    tolerance = TOLERANCE[loaded.tuned.model.dtype]
    agrees = require([merged_agrees(loaded.tuned, ids, tolerance=tolerance)])
    loaded.tuned.export_model(target, loaded.tokenizer)
    return require([*agrees, _written_agrees(loaded, target, ids), _template(loaded, target)])


def _probe_ids(loaded: LoadedRun) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocab = loaded.tuned.model.config.get_text_config().vocab_size
    return torch.randint(vocab, PROBE, generator=generator).to(loaded.peers.device)


@torch.no_grad()
def _written_agrees(loaded: LoadedRun, target: Path, ids: torch.Tensor) -> Proof:
    """The written directory, loaded as any model, gives the merged model's logits, bit for bit."""
    written = json.loads((target / "config.json").read_text(encoding="utf-8"))["dtype"]
    model = load_model(str(target), device=ids.device, dtype=DTYPES[written]).model
    with loaded.tuned.merged() as merged:
        difference = (merged(ids).logits - model(ids).logits).abs().max().item()
    detail = f"largest difference of logits {difference:.2e} in {written}"
    return Proof("written directory loads equal", difference == 0, detail)


def _template(loaded: LoadedRun, target: Path) -> Proof:
    return same_template(loaded.tokenizer, target)
