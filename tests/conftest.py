"""What every test stands on: no hub, few threads, the shared data where it is."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

from tiny import tiny_llama, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, beside the repository or named by TUNESMITH_SHARED."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    root = Path(os.environ.get("TUNESMITH_SHARED", beside))
    if not (root / "data").is_dir():
        pytest.skip(f"no data folder at {root / 'data'}: set TUNESMITH_SHARED")
    return root / "data"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random Llama and its byte tokenizer, as `model.name` takes it."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
