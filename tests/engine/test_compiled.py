"""Blocks as one graph: the same gradients, one graph for every length, and a way out.

The backend is PyTorch's `eager`: it captures the graph, which is what can go wrong here, and leaves
out the minutes of code generation. `tests/gpu/test_compiled.py` runs what is generated.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from families import FAMILIES
from numerics.matrix import IDS, base, method_of, tokens, trained, tuned_of
from plain_task import Network, plain_task, train, weights
from tiny import tiny_llama
from tunesmith.engine import compiled
from tunesmith.engine.blocks import Blocks, training_blocks
from tunesmith.engine.compiled import compiles
from tunesmith.engine.events import Event, Warned
from tunesmith.engine.settings import EngineSettings
from tunesmith.methods import LlamaAdapter, LoRA, ReFT
from tunesmith.methods.contract import Method
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.attention import enable_segments
from tunesmith.models.quantize import quantise
from tunesmith.models.settings import ModelSettings
from tunesmith.ops.loss_by_logits import is_plain

CPU = torch.device("cpu")
LENGTHS = [5, 9, 7, 12]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph of another test, and a cache of this one's own."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    torch._dynamo.reset()
    counters.clear()


@contextmanager
def training(model: nn.Module, blocks: list[nn.Module], **settings: str) -> Iterator[Blocks]:
    chosen = EngineSettings.model_validate(
        {"device": "cpu", "speed": "compiled", "checkpointing": "none"} | settings
    )
    with training_blocks(model, blocks, chosen, device=CPU, backend="eager") as running:
        yield running


def blocks_of(tuned: TunedModel) -> list[nn.Module]:
    return [tuned.model.get_submodule(block.path) for block in tuned.sites.blocks]


def gradients(tuned: TunedModel, family: str, ids: Tensor = IDS) -> dict[str, Tensor]:
    torch.manual_seed(3)
    tuned.model.zero_grad()
    FAMILIES[family].loss(tuned.model, ids).backward()
    named = tuned.trainable().items()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


CASES = [
    ("llama", "lora", "none"),
    ("llama", "lora", "full"),
    ("llama", "lora", "offload"),
    ("llama", "dora", "full"),
    ("qwen3", "ia3", "full"),
    ("gemma3_text", "adapter", "none"),
    ("gpt2", "prefix_tuning", "full"),
    ("bert", "bitfit", "full"),
    ("llama", "full", "full"),
]


@pytest.mark.parametrize(("family", "method", "checkpointing"), CASES)
def test_compiled_blocks_give_the_same_gradients(
    family: str, method: str, checkpointing: str
) -> None:
    chosen = LoRA(dora=True) if method == "dora" else method_of(method)
    tuned = trained(attach(base(family), chosen))
    tuned.model.train()
    expected = gradients(tuned, family)
    with training(tuned.model, blocks_of(tuned), checkpointing=checkpointing) as running:
        found = gradients(tuned, family)
        assert not running.failed
        assert graphs() > 0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


ON_SOME_BLOCKS = [
    *(ReFT(rank=2, layers=layers) for layers in ([3], [0], [1, 2])),
    LlamaAdapter(length=2, layers=2),
]


@pytest.mark.parametrize("method", ON_SOME_BLOCKS, ids=str)
def test_blocks_with_a_method_and_blocks_without_get_graphs_of_their_own(method: Method) -> None:
    tuned = trained(attach(tiny_llama(num_hidden_layers=4), method))
    tuned.model.train()
    expected = gradients(tuned, "llama")
    with training(tuned.model, blocks_of(tuned)) as running:
        found = gradients(tuned, "llama")
        assert not running.failed
        assert graphs() >= 2
    assert expected.keys() == tuned.trainable().keys()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def four_layers() -> TunedModel:
    tuned = attach(tiny_llama(num_hidden_layers=4), LoRA(rank=2))
    tuned.model.train()
    return tuned


def step(tuned: TunedModel, running: Blocks, length: int) -> None:
    batch = {"input_ids": torch.arange(2 * length).reshape(2, length)}
    running.see(batch)
    tuned.model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()


def test_blocks_share_graphs_and_lengths_share_one_after_the_second() -> None:
    tuned = four_layers()
    with training(tuned.model, blocks_of(tuned)) as running:
        step(tuned, running, LENGTHS[0])
        # The first block's input needs no gradient, that of the others does.
        assert graphs() == 2
        step(tuned, running, LENGTHS[1])
        warm = graphs()
        for length in LENGTHS[2:]:
            step(tuned, running, length)
        assert graphs() == warm == 4


def segments(lengths: list[int]) -> dict[str, Any]:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    total = sum(lengths)
    return {
        "input_ids": torch.arange(total)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds.clone(),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize(
    ("kind", "products"),
    [("fp8", "dtype"), ("nf4", "dtype"), ("nf4", "float8"), ("int8", "dtype")],
)
def test_a_base_of_codes_is_in_one_graph_for_all_lengths(kind: str, products: str) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=128).bfloat16()
    settings = {"name": "tiny", "quantize": kind, "products": products}
    quantise(model, ModelSettings.model_validate(settings), device="cpu")
    tuned = trained(attach(model, LoRA(rank=4)))
    tuned.model.train()
    many = [tokens(2, length) for length in LENGTHS]
    expected = [gradients(tuned, "llama", ids) for ids in many]
    with training(tuned.model, blocks_of(tuned)) as running:
        for ids, wanted in zip(many, expected, strict=True):
            running.see({"input_ids": ids})
            torch.testing.assert_close(gradients(tuned, "llama", ids), wanted)
        assert not running.failed


def test_segments_side_by_side_are_in_the_graph_whatever_their_number_and_lengths() -> None:
    tuned = four_layers()
    assert enable_segments(tuned.model)
    batches = [segments(x) for x in ([5, 4], [7, 4, 6], [9, 2, 3, 4], [8, 8])]
    expected = [tuned.model.model(**batch).last_hidden_state for batch in batches]
    with training(tuned.model, blocks_of(tuned)) as running:
        for batch, hidden in zip(batches, expected, strict=True):
            running.see(batch)
            found = tuned.model.model(**batch, use_cache=False).last_hidden_state
            torch.testing.assert_close(found, hidden, atol=1e-5, rtol=1e-4)
        assert not running.failed
        # None is for the lengths of the first batch alone.
        assert graphs() == 2


def test_segments_of_one_length_have_a_graph_of_their_own_until_another_comes() -> None:
    tuned = four_layers()
    assert enable_segments(tuned.model)
    with training(tuned.model, blocks_of(tuned)) as running:
        for lengths, expected in (([6, 6], 2), ([6, 6], 2), ([9, 9], 4), ([7, 5], 4)):
            batch = segments(lengths)
            running.see(batch)
            tuned.model.model(**batch, use_cache=False)
            assert graphs() == expected


def test_switching_a_method_off_is_seen_by_what_is_compiled() -> None:
    tuned = trained(tuned_of("llama", "lora"))
    tuned.model.train()
    inputs = FAMILIES["llama"].inputs(IDS)
    with tuned.disabled():
        base = tuned.model(**inputs).logits
    tuned_logits = tuned.model(**inputs).logits
    with training(tuned.model, blocks_of(tuned)):
        torch.testing.assert_close(tuned.model(**inputs, use_cache=False).logits, tuned_logits)
        with tuned.disabled():
            torch.testing.assert_close(tuned.model(**inputs, use_cache=False).logits, base)
        torch.testing.assert_close(tuned.model(**inputs, use_cache=False).logits, tuned_logits)


def test_evaluation_and_generation_run_as_without_compiling() -> None:
    tuned = four_layers()
    ids = torch.arange(6)[None]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = tuned.model.eval().generate(ids, **options)
    with training(tuned.model, blocks_of(tuned)):
        assert torch.equal(tuned.model.generate(ids, **options), expected)
        assert graphs() == 0


class Broken(nn.Module):
    """A block that looks at its data, which no graph can."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        assert x.sum().item() < 1e9
        out: Tensor = self.block(x)
        return out


def test_a_block_that_is_no_graph_runs_as_it_is_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    plain, broken = plain_task(), plain_task()
    network = broken.model
    assert isinstance(network, Network)
    network.blocks[1] = Broken(network.blocks[1])
    broken.block_modules = list(network.blocks)
    broken.trainable = dict(network.named_parameters())
    events: list[Event] = []
    train(plain, tmp_path / "plain")
    speed = EngineSettings(device="cpu", speed="compiled")
    train(broken, tmp_path / "broken", engine=speed, listen=events.append)
    warned = [event.message for event in events if isinstance(event, Warned)]
    assert len(warned) == 1
    assert "engine.speed: blocks.1" in warned[0]
    assert "test_compiled.py" in warned[0]
    assert graphs() > 0
    learned = {name.replace(".block.", "."): p for name, p in weights(broken).items()}
    torch.testing.assert_close(learned, weights(plain), atol=1e-6, rtol=1e-5)


def test_an_error_of_the_compiler_itself_lets_a_block_run_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch passes its own failed assertions on as they are."""

    def fail(*_: Any, **__: Any) -> Tensor:
        error = AssertionError("lift_tracked_freevar_to_input")
        if traces:
            error._torch_dynamo_tracer_output = None  # type: ignore[attr-defined]
        raise error

    tuned = trained(attach(base("llama"), LoRA(rank=4)))
    tuned.model.train()
    expected = gradients(tuned, "llama")
    monkeypatch.setattr(compiled.CompiledCall, "_compile", lambda self: fail)
    traces = True
    with training(tuned.model, blocks_of(tuned)) as running:
        torch.testing.assert_close(gradients(tuned, "llama"), expected)
        assert all("lift_tracked" in reason for reason in running.failed.values())
        assert running.failed
    traces = False  # and what the block itself finds wrong is not hidden
    with training(tuned.model, blocks_of(tuned)), pytest.raises(AssertionError):
        gradients(tuned, "llama")


def test_the_model_is_uncompiled_after_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    task = plain_task()
    train(task, tmp_path, engine=EngineSettings(device="cpu", speed="compiled"))
    assert all(module._compiled_call_impl is None for module in task.module.modules())
    assert graphs() > 0


@pytest.mark.parametrize(
    ("speed", "device", "sharded", "expected"),
    [
        ("auto", "cpu", False, False),
        ("auto", "cuda", False, True),
        ("auto", "cuda", True, False),
        ("safe", "cuda", False, False),
        ("compiled", "cpu", False, True),
    ],
)
def test_what_is_compiled_where(speed: str, device: str, sharded: bool, expected: bool) -> None:
    settings = EngineSettings.model_validate({"speed": speed})
    assert compiles(settings, torch.device(device), sharded=sharded) is expected


def test_compiled_code_is_kept_in_the_cache_unless_the_user_has_a_place_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "TORCHINDUCTOR_CACHE_DIR"
    with compiled.compiling():
        assert os.environ[variable] == str(tmp_path / "cache" / "compiled")
    assert variable not in os.environ
    monkeypatch.setenv(variable, "/elsewhere")
    with compiled.compiling():
        assert os.environ[variable] == "/elsewhere"


def test_safe_leaves_the_compiler_out_of_the_loss_too() -> None:
    network = Network(0.0)
    for speed in ("safe", "auto", "compiled"):
        with training(network, list(network.blocks), speed=speed):
            assert is_plain() == (speed == "safe")
        assert not is_plain()
