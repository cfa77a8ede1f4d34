"""summary.json: the evidence that comparisons and reports are computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from tunesmith.data.asked import AskedData
from tunesmith.engine.memory import peak_memory
from tunesmith.jobs.environment import hardware
from tunesmith.methods.child import base_modules
from tunesmith.models.quantize import bytes_in_memory
from tunesmith.models.skeleton import kind_of

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.data.prepare import PreparedData
    from tunesmith.engine.loop import Outcome
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.jobs.run_directory import RunDirectory
    from tunesmith.spec import Run
    from tunesmith.types import JSON, Proof


def summarise(
    assembled: Assembled,
    outcome: Outcome,
    *,
    after: Mapping[str, float],
    proofs: Sequence[Proof],
    directory: RunDirectory,
    wall_seconds: float,
) -> dict[str, JSON]:
    """Return the evidence of a finished run, all of it measured.

    Args:
        assembled: the run.
        outcome: what the loop counted.
        after: metrics of the result.
        proofs: what was checked.
        directory: holds the saved result.
        wall_seconds: of this process's whole job, loading and measuring included.
    """
    run, counts = assembled.run, assembled.tuned.parameter_counts()
    seconds, device = max(outcome.seconds, 1e-9), assembled.tuned.model.device
    result = directory.adapter if directory.adapter.exists() else directory.model
    return {
        "name": run.name,
        "model": run.model.name,
        "method": run.method_name,
        "objective": run.objective.name,
        "kind": kind_of(assembled.tuned.model.config),
        "before": dict(outcome.before),
        "after": dict(after),
        "steps": outcome.steps,
        "stopped_because": outcome.stopped_because,
        "skipped_steps": outcome.skipped_steps,
        "seconds": round(outcome.seconds, 2),
        "wall_seconds": round(wall_seconds, 2),
        "tokens": outcome.tokens,
        "supervised_tokens": outcome.supervised_tokens,
        "tokens_per_second": round(outcome.tokens_per_second, 1),
        "supervised_tokens_per_second": round(outcome.supervised_tokens / seconds, 1),
        **_peaks(device, outcome.memory_bytes),
        "identity_at_start": assembled.tuned.identity_at_start,
        "merges": all(attachment.merges for attachment in assembled.tuned.attachments),
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.base,
        "base_bytes": bytes_in_memory(m for _, m in base_modules(assembled.tuned.model)),
        "result_bytes": weights_bytes(result),
        "data": _told(assembled.data),
        "proofs": [proof._asdict() for proof in proofs],
        "hardware": hardware(),
    }


def without_steps(run: Run, data: PreparedData, device: torch.device) -> dict[str, JSON]:
    """Return what is the same in the evidence of every run that takes no training steps.

    Method, kind, metrics, seconds and parameters are for the caller to add.

    Args:
        run: what was asked for.
        data: its rows.
        device: what computed.
    """
    return {
        "name": run.name,
        "model": run.model.name,
        "objective": run.objective.name,
        "before": {},
        "steps": 0,
        **_peaks(device, peak_memory(device)),
        "data": _told(data),
        "proofs": [],
        "hardware": hardware(),
    }


def _peaks(device: torch.device, memory_bytes: int) -> dict[str, JSON]:
    return {
        "peak_memory_bytes": memory_bytes,
        "peak_process_bytes": peak_memory(torch.device("cpu")),
        "peak_device_bytes": None if device.type == "cpu" else memory_bytes,
    }


def _told(data: PreparedData) -> dict[str, JSON]:
    told: dict[str, JSON] = {"train": data.train_report.to_json()}
    if isinstance(data, AskedData) and data.texts is not None:
        told["pretraining"] = data.texts.report().to_json()
    if data.evaluation_report is not None:
        told["evaluation"] = data.evaluation_report.to_json()
    return told


def weights_bytes(directory: Path) -> int:
    """Return the bytes of the saved weights."""
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
