"""What every test stands on: no hub, few threads, the shared data where it is."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

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
