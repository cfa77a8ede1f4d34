"""Fetching a model's directory from the Hugging Face Hub, or finding it in the Hub's cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from tunesmith.models.settings import ModelSettings

# Pickled weights are not even fetched, and Python files only where the settings trust them.
_FILES: Final = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_TIMEOUT: Final = 10
"""Seconds to wait for the Hub's first answer before the cache is looked at."""


def download(
    name: str,
    settings: ModelSettings,
    *,
    otherwise: str,
    only: Sequence[str] | None = None,
    key: str = "model.name",
) -> Path:
    """Return the local directory of Hub model `name`: from the Hub, or from its cache if offline.

    Args:
        name: `owner/model`, or a bare name.
        settings: for the revision, and whether Python files may come along.
        otherwise: end of the message when there is no such model.
        only: names of files, where not all are needed.
        key: the setting that says `name`.

    Raises:
        ModelError: no such model or revision, no access, or offline and not cached.
    """
    files = [*(only or _FILES), *(["*.py"] if settings.trust_remote_code else [])]
    try:
        directory = huggingface_hub.snapshot_download(
            name,
            revision=settings.revision,
            allow_patterns=files,
            etag_timeout=_TIMEOUT,
        )
    except LocalEntryNotFoundError as error:
        why = "this machine is offline and the Hub's cache does not have it"
        raise ModelError(f"{key}: '{name}' is no path, and {why}{otherwise}") from error
    except HFValidationError as error:
        raise ModelError(
            f"{key}: '{name}' is neither a path nor a name the Hub could have{otherwise}"
        ) from error
    except GatedRepoError as error:
        raise ModelError(
            f"{key}: '{name}' is gated; ask for access on its Hub page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"model.revision: '{name}' has no revision '{settings.revision}' on the Hub"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{key}: '{name}' is no path, and the Hub has no such public model{otherwise}"
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"{key}: the Hub did not hand out '{name}' ({error})") from error
    return Path(directory)
