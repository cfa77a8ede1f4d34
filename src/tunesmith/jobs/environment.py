"""What a result depends on besides its spec."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from tunesmith._version import __version__

if TYPE_CHECKING:
    from tunesmith.types import JSON

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "peft",
    "bitsandbytes",
)


def package_versions() -> dict[str, JSON]:
    """Return the version of every library that decides numbers; None where it is not installed."""
    found: dict[str, JSON] = {"tunesmith": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, JSON]:
    """Return processor, memory in bytes and accelerators."""
    devices: list[JSON] = [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "cuda_devices": devices,
    }


def processor_name() -> str:
    """Return the processor's marketing name, or its architecture where nobody tells."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(seed: int) -> dict[str, JSON]:
    """Return everything for environment.json."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": package_versions(),
        "hardware": hardware(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "code_revision": _code_revision(),
        "command": [*sys.argv],
    }


def _code_revision() -> str | None:
    """Return the git commit of a source checkout, or None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
