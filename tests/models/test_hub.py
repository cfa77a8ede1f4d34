"""What the Hub may answer, and the sentence each answer becomes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tunesmith.errors import ModelError
from tunesmith.models.hub import download
from tunesmith.models.settings import ModelSettings


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (GatedRepoError, "'a/b' is gated; ask for access"),
        (RevisionNotFoundError, "model.revision: 'a/b' has no revision 'v2'"),
        (RepositoryNotFoundError, "the Hub has no such public model; or c"),
        (HfHubHTTPError, "the Hub did not hand out 'a/b'"),
    ],
)
def test_each_refusal_is_one_sentence(
    error: type[HfHubHTTPError], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_options: Any) -> str:
        raise error("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=sentence):
        download("a/b", ModelSettings(revision="v2"), otherwise="; or c")


@pytest.mark.parametrize("trust", [False, True])
def test_pickles_are_not_fetched_and_code_only_where_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, trust: bool
) -> None:
    asked: dict[str, Any] = {}

    def answer(_name: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    settings = ModelSettings(trust_remote_code=trust)
    assert download("a/b", settings, otherwise="") == tmp_path
    assert ("*.py" in asked["allow_patterns"]) == trust
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])
