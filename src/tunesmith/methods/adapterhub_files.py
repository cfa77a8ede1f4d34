"""What AdapterHub's `save_adapter` leaves in a directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.errors import AdapterError

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = ("adapter.safetensors", "pytorch_adapter.bin")


@dataclass(frozen=True)
class HubAdapter:
    """An adapter as AdapterHub saved it."""

    name: str
    """The name it had there, which is in its tensors' names."""
    model_type: str
    config: dict[str, Any]
    """What configures the method; `architecture` says which, None being a bottleneck."""
    tensors: dict[str, Tensor]

    def require(self, wanted: dict[str, Any]) -> None:
        """Check that the configuration says what is `wanted`, where it says anything.

        Raises:
            AdapterError: it says something else.
        """
        for key, value in wanted.items():
            if self.config.get(key, value) != value:
                raise AdapterError(
                    f"{CONFIG}: {key} {self.config[key]!r} makes it compute what no method here "
                    f"does, only {key} {value!r} can be read; train it anew"
                )


def read_adapterhub(directory: str | Path) -> HubAdapter:
    """Read what AdapterHub's `save_adapter` wrote.

    Raises:
        AdapterError: there is none in `directory`, or a file is damaged.
    """
    folder = Path(directory)
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name, model_type = said["name"], said["model_type"]
        config = {"architecture": None, **said["config"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder / CONFIG} is of no adapter of AdapterHub ({type(error).__name__}: {error}); "
            "give the directory that its save_adapter wrote"
        ) from error
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise AdapterError(f"{folder} holds no weights: there is no {' and no '.join(WEIGHTS)}")
    return HubAdapter(name, model_type, config, _tensors(file))


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        if not is_zipfile(file):
            raise AdapterError(
                f"{file} cannot be read: it is damaged, or older than PyTorch 1.6; save it again "
                "with a current AdapterHub"
            )
        # AdapterHub has no other format for a prefix. Tensors only: other pickles could run code.
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (SafetensorError, OSError, RuntimeError, UnpicklingError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
