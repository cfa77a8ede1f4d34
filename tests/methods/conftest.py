"""What the method tests share: inputs, models, and adapters that do something."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import VOCAB, tiny_gpt2, tiny_llama
from tunesmith.methods.tuned import TunedModel


@pytest.fixture
def input_ids() -> Tensor:
    """Two sequences of seven tokens."""
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny model: separate nn.Linear projections, or fused Conv1D with biases."""
    return request.param()


@pytest.fixture
def trained() -> Callable[[TunedModel], TunedModel]:
    """Give every trainable parameter a random change, as training would."""

    def change(tuned: TunedModel) -> TunedModel:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in tuned.trainable().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return tuned

    return change


@pytest.fixture
def loss() -> Callable[[nn.Module, Tensor], Tensor]:
    """A loss whose gradient differs at every position."""

    def mean_nll(model: nn.Module, input_ids: Tensor) -> Tensor:
        return model(input_ids, labels=input_ids).loss

    return mean_nll
