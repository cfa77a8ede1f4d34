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
from tunesmith.models.loading import load_tokenizer
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


def test_of_another_tokenizer_no_weights_are_fetched_and_not_the_models_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(name: str, **options: Any) -> str:
        assert (name, options["revision"]) == ("c/d", None)
        assert "*.safetensors" not in options["allow_patterns"]
        assert "*.json" in options["allow_patterns"]
        raise RepositoryNotFoundError("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(ModelError, match=r"model\.tokenizer: 'c/d' is no path"):
        load_tokenizer(ModelSettings(name="a/b", revision="v2", tokenizer="c/d"))


def test_a_tokenizer_that_is_not_there_is_named_as_one(tmp_path: Path) -> None:
    settings = ModelSettings(name=str(tmp_path), tokenizer=str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"model\.tokenizer: there is no file"):
        load_tokenizer(settings)
