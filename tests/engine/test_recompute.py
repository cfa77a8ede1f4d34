"""Gradient checkpointing changes memory, not gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from plain_task import number_rows, plain_task, train
from tiny import tiny_llama
from tunesmith.engine.recompute import recomputing
from tunesmith.engine.settings import EngineSettings
from tunesmith.errors import ModelError

FULL = EngineSettings(device="cpu", checkpointing="full")


def gradients(settings: EngineSettings) -> tuple[dict[str, Tensor], int]:
    """Gradients of a tiny Llama with dropout and a frozen lower block; calls of the lower MLP."""
    torch.manual_seed(0)
    model = tiny_llama(attention_dropout=0.2).train()
    model.model.embed_tokens.requires_grad_(False)
    calls: list[int] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    rows = torch.tensor([row[:2] for row in number_rows()])
    with recomputing(model, settings):
        model(rows, labels=rows, use_cache=False).loss.backward()
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}, len(calls)


def test_recomputing_gives_the_same_gradients() -> None:
    plain, calls = gradients(EngineSettings(device="cpu"))
    again, calls_again = gradients(FULL)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert (calls, calls_again) == (1, 2)


def test_it_is_switched_off_afterwards() -> None:
    model = tiny_llama()
    with recomputing(model, FULL):
        assert model.model.layers[0].gradient_checkpointing
    assert not model.model.layers[0].gradient_checkpointing


def test_nothing_makes_the_embeddings_need_a_gradient() -> None:
    model = tiny_llama().requires_grad_(False)
    with recomputing(model, FULL):
        output = model.model.embed_tokens(torch.tensor([[1]]))
    assert not output.requires_grad


def test_a_model_that_cannot_recompute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"engine.checkpointing: 'full' is not supported by Network"
    ):
        train(plain_task(), tmp_path, engine=FULL)


def test_an_architecture_that_cannot_recompute_is_refused() -> None:
    model = tiny_llama()
    model.supports_gradient_checkpointing = False
    with (
        pytest.raises(ModelError, match="not supported by LlamaForCausalLM"),
        recomputing(model, FULL),
    ):
        pass


def test_the_cache_is_off_while_recomputing_and_then_as_it_was() -> None:
    model = tiny_llama()
    assert model.config.use_cache
    with recomputing(model, FULL):
        assert not model.config.use_cache
    assert model.config.use_cache
