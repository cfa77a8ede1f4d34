"""What a saved adapter consists of on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tunesmith._version import __version__
from tunesmith.errors import AdapterError
from tunesmith.methods import MethodUnion
from tunesmith.methods.atomic import whole_directory
from tunesmith.methods.contract import PeftFiles
from tunesmith.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.sites import Sites

TENSORS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
RECORD: Final = "tunesmith.json"


class Base(Settings):
    """The base model an adapter was made on."""

    name: str
    """The name it was loaded by."""
    model_type: str
    """Its architecture, as transformers names it."""
    shape: str
    """Fingerprint of the sizes of all places where adapters attach."""


class SavedHead(Settings):
    """A classification head that lies beside an adapter's tensors."""

    kind: Literal["sequence_classification", "token_classification"]
    """What it classifies."""
    labels: tuple[str, ...]
    """Names of its outputs, in their order."""
    parameters: tuple[str, ...]
    """Names of its parameters in the model."""


class Record(Settings):
    """tunesmith.json: how the adapter came about."""

    format: Literal[1] = 1
    """Version of this layout."""
    tunesmith: str = __version__
    """Version that wrote it."""
    name: str
    """Name of the adapter."""
    method: MethodUnion
    """The method and its settings."""
    base: Base
    """What it was made on."""
    head: SavedHead | None = None
    """The head that was trained with it, where the model is a classifier."""


@dataclass(frozen=True)
class AdapterFiles:
    """One adapter: its tensors, and what its two JSON files say."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    """PEFT's adapter_config.json where PEFT knows the method; the tensors then have its names."""
    record: Record | None
    """tunesmith.json; None where PEFT wrote the adapter, or is meant to read it."""

    @property
    def title(self) -> str:
        """Name of the adapter and of its method."""
        return f"{self.record.name}-{self.record.method.name}" if self.record else "adapter"


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter as read from `directory`."""

    directory: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    record: Record | None

    @property
    def peft(self) -> PeftFiles | None:
        """What PEFT's two files hold, or None where the layout is not PEFT's."""
        if self.config is None:
            return None
        return PeftFiles(self.config, self.tensors, self.directory / CONFIG)


def base_name(adapter: SavedAdapter) -> str:
    """Return the name of the base that an adapter was made on; empty where it does not say."""
    if adapter.record is not None:
        return adapter.record.base.name
    return str((adapter.config or {}).get("base_model_name_or_path") or "")


def base_of(model: PreTrainedModel, sites: Sites) -> Base:
    """Return what identifies `model` as the base of an adapter."""
    sizes = [
        (site.module, site.name, site.in_features, site.out_features)
        for block in sites.blocks
        for site in block.sites
    ]
    embedding = model.get_input_embeddings()
    text = json.dumps([sizes, embedding.num_embeddings, embedding.embedding_dim])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Base(name=model.name_or_path, model_type=sites.model_type, shape=digest)


def write_adapters(directory: Path, adapters: Sequence[AdapterFiles]) -> None:
    """Write one adapter into `directory`, or several, each into a folder of its own there.

    Raises:
        AdapterError: the directory holds other files, which replacing it would delete.
        CheckpointError: it cannot be written; what was there is untouched.
    """
    _require_replaceable(directory)
    with whole_directory(directory) as partial:
        for place, adapter in places_of_adapters(partial, adapters):
            place.mkdir(exist_ok=True)
            _write(place, adapter)


def places_of_adapters(
    directory: Path, adapters: Sequence[AdapterFiles]
) -> list[tuple[Path, AdapterFiles]]:
    """Return each adapter with its folder: `directory` itself where it is the only one.

    Several have a number, so that they are read in the order in which they were attached.
    """
    if len(adapters) == 1:
        return [(directory, adapters[0])]
    return [(directory / f"{i:02d}-{a.title}", a) for i, a in enumerate(adapters, start=1)]


def _write(place: Path, adapter: AdapterFiles) -> None:
    """Write the files of one adapter."""
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, place / TENSORS, metadata={"format": "pt"})
    if adapter.config is not None:
        text = json.dumps(adapter.config, indent=2, sort_keys=True, ensure_ascii=False)
        (place / CONFIG).write_text(text + "\n", encoding="utf-8")
    if adapter.record is not None:
        text = adapter.record.model_dump_json(indent=2)
        (place / RECORD).write_text(text + "\n", encoding="utf-8")


def _require_replaceable(directory: Path) -> None:
    """Raise AdapterError where `directory` is or holds something that no adapter consists of."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise AdapterError(f"{directory} is a file; an adapter is saved as a directory")
    for path in directory.iterdir():
        if path.is_dir() and (path / TENSORS).exists():
            _require_replaceable(path)
        elif path.name not in {TENSORS, CONFIG, RECORD}:
            raise AdapterError(
                f"{directory} holds {path.name}, which saving an adapter there would delete; "
                "choose another directory"
            )


def read_adapters(directory: Path) -> list[SavedAdapter]:
    """Read all adapters saved in `directory`, by Tunesmith or by PEFT.

    Raises:
        AdapterError: there is none, or a file is damaged or means something that cannot be read.
    """
    if (directory / TENSORS).exists():
        return [_read(directory)]
    folders = sorted(p.parent for p in directory.glob(f"*/{TENSORS}")) if directory.is_dir() else []
    if folders:
        return [_read(folder) for folder in folders]
    if (directory / "adapter_model.bin").exists():
        raise AdapterError(
            f"{directory} holds its weights as a pickle (adapter_model.bin), which can run code "
            "when read; save it again with PEFT's safe_serialization=True"
        )
    raise AdapterError(f"{directory} holds no adapter: there is no {TENSORS} in it")


def _read(directory: Path) -> SavedAdapter:
    """Read the files of one adapter."""
    config_file, record_file = directory / CONFIG, directory / RECORD
    config = record = None
    if config_file.exists():
        config = _read_config(config_file)
    if record_file.exists():
        record = _read_record(record_file)
    if config is None and record is None:
        raise AdapterError(f"{directory} has neither {RECORD} nor {CONFIG} beside {TENSORS}")
    return SavedAdapter(directory, _read_tensors(directory / TENSORS), config, record)


def _text(file: Path) -> str:
    """Return the content of a text file."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error


def _read_config(file: Path) -> dict[str, Any]:
    """Return what an adapter_config.json says."""
    try:
        config = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise AdapterError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds {type(config).__name__} where PEFT writes an object")
    return config


def _read_record(file: Path) -> Record:
    """Return what a tunesmith.json says."""
    try:
        return Record.model_validate_json(_text(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise AdapterError(f"{file}: {where}: {first['msg']}") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged or no safetensors file: {error}") from error
