"""Every way of computing activations again changes memory, and not gradients."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from plain_task import number_rows, plain_task, train, weights
from tiny import tiny_llama
from tunesmith.engine.blocks import Blocks, Level, training_blocks
from tunesmith.engine.events import CheckpointingChosen, Event, MicroBatchHalved
from tunesmith.engine.host_copies import HostCopies
from tunesmith.engine.settings import EngineSettings
from tunesmith.errors import ModelError
from tunesmith.types import Batch, LossTerms

CPU = torch.device("cpu")
MODES = pytest.mark.parametrize("mode", ["selective", "attention", "full", "offload"])


def settings(mode: str) -> EngineSettings:
    return EngineSettings.model_validate({"device": "cpu", "checkpointing": mode})


@contextmanager
def training(model: LlamaForCausalLM, mode: str) -> Iterator[Blocks]:
    with training_blocks(model, list(model.model.layers), settings(mode), device=CPU) as blocks:
        yield blocks


def gradients(mode: str) -> tuple[dict[str, Tensor], int]:
    """Gradients of a tiny Llama with dropout and frozen embeddings; calls of the lower MLP."""
    torch.manual_seed(0)
    model = tiny_llama(attention_dropout=0.2).train()
    model.model.embed_tokens.requires_grad_(False)
    calls: list[int] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    rows = torch.tensor([row[:2] for row in number_rows()])
    with training(model, mode):
        model(rows, labels=rows, use_cache=False).loss.backward()
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}, len(calls)


@MODES
def test_recomputing_gives_the_same_gradients(mode: str) -> None:
    plain, calls = gradients("none")
    again, calls_again = gradients(mode)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert (calls, calls_again) == (1, 2)


def saved_bytes(mode: str) -> int:
    """Bytes that a forward pass keeps outside of parameters, each storage once."""
    model = tiny_llama().train()
    rows = torch.arange(64).reshape(2, 32)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with training(model, mode), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(rows, labels=rows, use_cache=False).loss
    del loss
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in parameters)


def test_whole_blocks_keep_less_than_everything() -> None:
    assert saved_bytes("full") < saved_bytes("none") / 2


class Counting(TorchDispatchMode):
    """Counts what is computed, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[func.name()] += 1
        return func(*args, **kwargs or {})


def backward_operations(mode: str) -> Counter[str]:
    model, rows = tiny_llama().train(), torch.arange(8)[None]
    with training(model, mode):
        loss = model(rows, labels=rows, use_cache=False).loss
        with Counting() as counting:
            loss.backward()
    return counting.counted


def test_each_mode_computes_again_what_it_does_not_keep() -> None:
    modes = ("none", "selective", "attention", "full")
    none, selective, keeping, full = map(backward_operations, modes)
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert none["aten::mm"] == selective["aten::mm"] < full["aten::mm"]
    assert (none[attention], selective[attention], full[attention]) == (0, 0, 2)
    assert keeping == full - Counter({attention: 2})
    assert (none["aten::silu"], selective["aten::silu"], full["aten::silu"]) == (0, 2, 2)


@MODES
def test_blocks_are_as_they_were_afterwards(mode: str) -> None:
    model = tiny_llama()
    assert model.config.use_cache
    with training(model, mode) as blocks:
        assert model.model.layers[0]._compiled_call_impl is not None
        assert not model.config.use_cache
        with blocks.plain():
            assert model.model.layers[0]._compiled_call_impl is None
    assert model.model.layers[0]._compiled_call_impl is None
    assert model.config.use_cache


@MODES
def test_a_run_learns_the_same(mode: str, tmp_path: Path) -> None:
    plain, again = plain_task(dropout=0.3), plain_task(dropout=0.3)
    train(plain, tmp_path / "plain", engine=settings("none"))
    train(again, tmp_path / "again", engine=settings(mode))
    torch.testing.assert_close(weights(again), weights(plain), rtol=0, atol=0)


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    task = plain_task()
    task.block_modules = []
    with pytest.raises(ModelError, match=r"engine.checkpointing: 'full' needs blocks.*Network"):
        train(task, tmp_path, engine=settings("full"))


class Short(nn.Module):
    """Runs out of memory as long as a block's activations are all kept."""

    def __init__(self, module: nn.Module, until: Level, levels: list[Level]) -> None:
        super().__init__()
        self.module = module
        self.until = until
        self.levels = levels

    def forward(self, batch: Batch) -> LossTerms:
        if self.levels[-1] != self.until:
            raise torch.OutOfMemoryError("pretended")
        terms: LossTerms = self.module(batch)
        return terms


@pytest.mark.parametrize(
    ("until", "last"),
    [
        (Level("selective"), "selective"),
        (Level("attention", 0.5), "attention in 50.0% of the blocks"),
    ],
)
def test_auto_recomputes_as_little_as_fits(until: Level, last: str, tmp_path: Path) -> None:
    events: list[Event] = []
    levels: list[Level] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, CheckpointingChosen):
            mode = None if event.mode == "none" else event.mode
            levels.append(Level(mode, event.share))  # type: ignore[arg-type]  # a mode it is

    plain, short = plain_task(), plain_task()
    short.module = Short(short.module, until, levels)
    train(plain, tmp_path / "plain")
    train(short, tmp_path / "short", engine=settings("auto"), listen=listen)
    torch.testing.assert_close(weights(short), weights(plain), rtol=0, atol=0)
    chosen = [event for event in events if isinstance(event, CheckpointingChosen)]
    assert chosen[0].message == "engine.checkpointing: auto takes none: memory suffices so far"
    assert chosen[-1].message == f"engine.checkpointing: auto takes {last}: memory ran out"
    assert not [event for event in events if isinstance(event, MicroBatchHalved)]


def test_host_copies_come_back_as_they_were_in_any_order() -> None:
    copies = HostCopies()
    tensors = [torch.randn(3, 4), torch.randn(5).requires_grad_(), torch.randn(2, 2).bfloat16()]
    away = [copies.send(tensor) for tensor in tensors]
    for index in (2, 0, 1):
        back = away[index].fetch()
        torch.testing.assert_close(back, tensors[index].detach().requires_grad_(back.requires_grad))
        assert back.requires_grad == tensors[index].requires_grad
