"""Blocks as one graph each: compiled in place, methods and their hooks inside."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from tunesmith.models.zoo import cache_dir
from tunesmith.ops.compile_workers import start_compile_workers
from tunesmith.ops.torch_errors import is_of_compiler, memory_error_in

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import Graph

    from tunesmith.engine.settings import EngineSettings

RECOMPILE_LIMIT: Final = 64
"""Graphs of one piece of code: kinds of block, with and without gradient, mask and fixed shapes."""
_CACHE: Final = "TORCHINDUCTOR_CACHE_DIR"
BACKEND = "inductor"
"""PyTorch's compiler; `eager` captures graphs and runs them as they are."""


Mark: TypeAlias = Callable[["Graph"], None]
"""Says of a graph of both passes what is kept; two that say the same are equal."""


class GraphError(Exception):
    """A block could not be captured or compiled; the message is the reason, in one line."""


class CompiledCall:
    """One block's call, compiled when it is first used.

    Shapes are constants of the graph until `dynamic` is set; sizes are then variables of one graph
    that serves every length.
    """

    def __init__(self, block: nn.Module, *, backend: str | None = None) -> None:
        self._block = block
        self._backend = backend or BACKEND
        self._dynamic = False
        self._mark: Mark | None = None
        if self._backend == "inductor":
            start_compile_workers()
        self._call = self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block.

        Raises:
            GraphError: it cannot be one graph; nothing of it has run.
        """
        try:
            return self._call(self._block, *args, **kwargs)
        except Exception as error:
            if not is_of_compiler(error):
                raise
            if (inner := memory_error_in(error)) is not None:
                raise inner from error
            raise GraphError(reason_of(error)) from error

    def make_dynamic(self) -> None:
        """Serve every length with one graph from now on."""
        self._dynamic = True
        self._call = self._compile()

    def mark(self, mark: Mark | None) -> None:
        """Let `mark` say what is kept for the backward pass; None leaves it to the compiler."""
        if mark != self._mark:
            self._mark = mark
            self._call = self._compile()

    def _compile(self) -> Callable[..., Any]:
        # Graphs are kept apart by their options, so that blocks that keep different things can
        # share code. A backend that generates none cuts no graph in two either.
        mark = self._mark if self._backend == "inductor" else None
        return torch.compile(
            _whole,
            fullgraph=True,
            dynamic=self._dynamic,
            backend=self._backend,
            options=None if mark is None else {"joint_custom_post_pass": mark},
        )


def _whole(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a block with its own hooks, which belong into the graph; one code for all blocks."""
    return block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def reason_of(error: BaseException) -> str:
    """Return why a block could not be captured, in one line with the place in the code."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    stack = list(getattr(error, "real_stack", None) or [])
    if not stack:
        # A backend's error quotes the code instead of giving its stack.
        quoted = re.findall(r'File "([^"]+)", line (\d+)', str(error))
        place = f" ({quoted[-1][0]}:{quoted[-1][1]})" if quoted else ""
    else:
        place = f" ({stack[-1].filename}:{stack[-1].lineno})"
    return f"{said or type(error).__name__}{place}"


def compiles(settings: EngineSettings, device: torch.device, *, sharded: bool) -> bool:
    """Return whether `engine.speed` means compiled blocks on this device.

    Args:
        settings: of the engine.
        device: what the run computes on.
        sharded: whether blocks gather their weights when they are called (FSDP), which is no part
            of a graph.
    """
    if settings.speed == "safe" or sharded:
        return False
    return settings.speed == "compiled" or device.type == "cuda"


@contextmanager
def compiling(*, recomputes_pointwise: bool = False) -> Iterator[None]:
    """Let blocks be compiled inside a `with` block: shared code, a cache on disk.

    Args:
        recomputes_pointwise: keep only what matrix products and attention need, and compute in the
            backward pass again whatever lies between them.
    """
    with (
        _cache(),
        torch._dynamo.config.patch(
            recompile_limit=RECOMPILE_LIMIT,
            accumulated_recompile_limit=8 * RECOMPILE_LIMIT,
            # Blocks share code and a method may hang on some of them only. PyTorch leaves hooks
            # out of what it checks before it takes a graph, and would take one without the method.
            skip_nnmodule_hook_guards=False,
        ),
        torch._functorch.config.patch(
            aggressive_recomputation=recomputes_pointwise,
            # Our own operators, such as float8's product, are none that cost little.
            is_non_builtin_to_include=recomputes_pointwise,
        ),
        torch._inductor.config.patch(joint_custom_pre_pass=_merge_products()),
    ):
        yield


def _merge_products() -> Any:
    # PyTorch's compiler takes seconds to import, and not every run compiles.
    from tunesmith.engine.narrow_products import MergeNarrowProducts

    return MergeNarrowProducts()


def attention_alone() -> Mark:
    """Return what lets a block keep what attention returned, and nothing else that it computed."""
    from tunesmith.engine.kept_attention import KeepAttention

    return KeepAttention()


@contextmanager
def _cache() -> Iterator[None]:
    """Keep compiled code between runs, for its first use takes a minute."""
    if _CACHE in os.environ:  # the user's own place
        yield
        return
    # PyTorch's default is in /tmp, which a restart empties.
    os.environ[_CACHE] = str(cache_dir() / "compiled")
    try:
        yield
    finally:
        os.environ.pop(_CACHE, None)
