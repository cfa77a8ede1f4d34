"""The model's blocks while they train: compiled or not, recomputed or not, and as before after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch

from tunesmith.engine.compiled import (
    CompiledCall,
    GraphError,
    Mark,
    attention_alone,
    compiles,
    compiling,
)
from tunesmith.engine.recompute import Mode, Recompute, recompute_of, without_cache
from tunesmith.errors import ModelError
from tunesmith.ops.loss_by_logits import plain_loss
from tunesmith.types import HEAD_ONLY

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.engine.settings import EngineSettings
    from tunesmith.types import Batch

SHARES: Final = 8
"""In how many steps `auto` goes from no block that recomputes to all of them."""


class Level(NamedTuple):
    """How much is recomputed."""

    mode: Mode | None
    """None keeps everything."""
    share: float = 1.0
    """Of the blocks; the first ones, which stand still longest, so that the others are free again
    before these are computed a second time."""

    def __str__(self) -> str:
        """Return the setting that it is, and of how many blocks."""
        share = f" in {self.share:.1%} of the blocks" if self.share < 1 else ""
        return f"{self.mode or 'none'}{share}"


class Start(NamedTuple):
    """What `auto` begins with, and why."""

    level: Level
    reason: str


TRIED: Final = "memory suffices so far"
"""Why `auto` begins with nothing, where nobody planned."""


class BlockCall(Protocol):
    """A block's call as one graph."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or raise GraphError before anything of it has run."""

    def make_dynamic(self) -> None:
        """Serve every length from now on."""

    def mark(self, mark: Mark | None) -> None:
        """Let `mark` say what is kept for the backward pass; None leaves it to the compiler."""


class TrainingBlock:
    """What is called in the place of one block."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module = module
        self.path = path
        self.compiled: BlockCall | None = None
        self.mode: Mode | None = None
        self.recompute: Recompute | None = None
        self.fails: Callable[[str, str], None] = _ignore

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if not self.module.training or kwargs.get("past_key_values") is not None:
            # Generation and measurement: a length of their own each time, and a cache that grows.
            return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        # A compiled block keeps these by itself, see `compiling` and `Mark`.
        inside = self.mode in {"selective", "attention"} and self.compiled is not None
        if self.recompute is None or inside or not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        return self.recompute(self._run, args, kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is not None:
            try:
                return self.compiled(*args, **kwargs)
            except GraphError as error:
                self.compiled = None
                self.fails(self.path, str(error))
        return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def _ignore(*said: str) -> None:
    del said


class Blocks:
    """All of them, under the settings of the engine; made by `training_blocks`.

    Args:
        model: what they are part of.
        blocks: what stands for each.
        levels: how much is recomputed: the first at once, the others where memory runs out.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[TrainingBlock], levels: Sequence[Level]
    ) -> None:
        self.warn: Callable[[str], None] = _ignore
        """Told why a block is not compiled."""
        self.choose: Callable[[Level, str], None] = _ignore_level
        """Told of a level and its reason, where the levels are chosen among."""
        self._model = model
        self._blocks = blocks
        self._levels = list(levels)
        self._installed = ExitStack()
        self._seen: set[tuple[Any, ...]] = set()
        self._any_length = False
        self.failed: dict[str, str] = {}
        """Why a block is not compiled, by its path."""
        for block in blocks:
            block.fails = self._fails
        self._set(self._levels.pop(0))

    @property
    def level(self) -> Level:
        """How much is recomputed now."""
        return self._level

    @property
    def has_choice(self) -> bool:
        """Whether more can be recomputed."""
        return bool(self._levels)

    def see(self, batch: Batch) -> None:
        """Prepare for a batch: once lengths differ, compiled blocks serve every length.

        One length alone has the faster graph, and much packed data has only one. Segments of
        different lengths will be others in the next batch: a graph for these would be made in vain.
        """
        if self._any_length:
            return
        both = [each for each in (batch, batch.get("texts")) if each is not None]
        self._seen |= {_shapes(each) for each in both}
        if len(self._seen) > 1 or any(map(_uneven, both)):
            self._any_length = True
            for block in self._blocks:
                if block.compiled is not None:
                    block.compiled.make_dynamic()

    def begin(self, level: Level) -> None:
        """Start with one of the levels that are chosen among."""
        while self._level != level and self._levels:
            self._set(self._levels.pop(0))

    def keep_less(self, reason: str) -> bool:
        """Recompute more from now on and say so; False where no more can be recomputed."""
        if not self._levels:
            return False
        self._set(self._levels.pop(0))
        self.choose(self._level, reason)
        return True

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Run the blocks as they are, inside a `with` block: for generation and measurements."""
        self.remove()
        try:
            yield
        finally:
            self.install()

    def install(self) -> None:
        """Stand in for the blocks."""
        self._installed.enter_context(without_cache(self._model))
        for block in self._blocks:
            # Where PyTorch's own Module.compile puts a compiled call.
            block.module._compiled_call_impl = block

    def remove(self) -> None:
        """Leave the model as it was."""
        self._installed.close()
        for block in self._blocks:
            block.module._compiled_call_impl = None

    def _set(self, level: Level) -> None:
        self._level = level
        count = round(level.share * len(self._blocks))
        again = None if level.mode is None else recompute_of(level.mode)
        for index, block in enumerate(self._blocks):
            block.recompute = again if index < count else None
            block.mode = level.mode if index < count else None
            if block.compiled is not None:
                block.compiled.mark(attention_alone() if block.mode == "attention" else None)

    def _fails(self, path: str, reason: str) -> None:
        # Blocks of one kind fail for one reason, and saying it once is enough.
        told = reason in self.failed.values()
        self.failed[path] = reason
        if not told:
            self.warn(
                f"engine.speed: {path}, and any block that fails alike, runs uncompiled: {reason}"
            )


def _ignore_level(level: Level, reason: str) -> None:
    del level, reason


@contextmanager
def training_blocks(
    model: nn.Module,
    modules: Sequence[nn.Module],
    settings: EngineSettings,
    *,
    device: torch.device,
    sharded: bool = False,
    backend: str | None = None,
    stand_in: Callable[[nn.Module], BlockCall] | None = None,
) -> Iterator[Blocks]:
    """Let the blocks run as `engine.speed` and `engine.checkpointing` say, inside a `with` block.

    Args:
        model: what the blocks are part of.
        modules: the blocks.
        settings: of the engine.
        device: what they run on.
        sharded: whether they gather their weights when they are called.
        backend: PyTorch's compiler; None is the one that generates code.
        stand_in: makes what takes the place of a compiled block where nothing is computed: a plan
            wants to know only what a graph keeps.

    Raises:
        ModelError: there are no blocks whose activations could be computed again.
    """
    paths = {module: path for path, module in model.named_modules()}
    blocks = [TrainingBlock(module, paths[module]) for module in modules]
    compiled = compiles(settings, device, sharded=sharded)
    levels = levels_of(settings, compiled=compiled)
    if not blocks and settings.checkpointing not in {"none", "auto"}:
        raise ModelError(
            f"engine.checkpointing: '{settings.checkpointing}' needs blocks to recompute, and "
            f"{type(model).__name__} has none; use none and a smaller train.batch_size"
        )
    with ExitStack() as stack:
        if settings.speed == "safe":
            stack.enter_context(plain_loss())
        if compiled:
            stack.enter_context(compiling(recomputes_pointwise=levels[0].mode == "selective"))
            for block in blocks:
                block.compiled = (
                    stand_in(block.module)
                    if stand_in
                    else CompiledCall(block.module, backend=backend)
                )
        controller = Blocks(model, blocks, levels)
        controller.install()
        stack.callback(controller.remove)
        yield controller


def levels_of(settings: EngineSettings, *, compiled: bool) -> list[Level]:
    """Return how much may be recomputed, the least first: one level, unless `auto` chooses."""
    if settings.checkpointing == "none":
        return [Level(None)]
    if settings.checkpointing != "auto":
        return [Level(settings.checkpointing)]
    # Compiled blocks compute the pointwise again as it is, wherever that costs no time.
    before = [] if compiled else [Level("selective")]
    shares = [Level("attention", (index + 1) / SHARES) for index in range(SHARES)]
    return [Level(None), *before, *shares, Level("full"), Level("offload")]


def _shapes(batch: Batch) -> tuple[Any, ...]:
    """Return what a graph for one length alone takes for a constant."""
    return tuple(
        (name, tuple(value.shape) if isinstance(value, torch.Tensor) else value)
        for name, value in sorted(batch.items())
        if isinstance(value, torch.Tensor | int) and name not in HEAD_ONLY
    )


def _uneven(batch: Batch) -> bool:
    """Return whether the segments of a batch have different lengths."""
    bounds = batch.get("cu_seq_lens_q")
    if bounds is None:
        return False
    return (len(bounds) - 1) * batch["max_length_q"] != batch["input_ids"].numel()
