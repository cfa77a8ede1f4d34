"""A batch in which each row uses its own adapter.

Every adapter that some row uses acts on the whole batch and is then hidden from the other rows, as
h + sum_a m_a(row) delta_a(x) with m_a in {0, 1}: plain tensors, no sorting of rows. Adapters that
no row uses are off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.child import ChildAttachment
from tunesmith.methods.input_rows import InputRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

    from tunesmith.methods.contract import Attachment
    from tunesmith.models.sites import Sites

RowNames = str | Sequence[str] | None
"""The adapters of one row: one, several side by side, or none."""


def names_of(row: RowNames) -> tuple[str, ...]:
    """Return the names of the adapters of one row."""
    return (row,) if isinstance(row, str) else tuple(row or ())


@contextmanager
def acting_by_row(
    parts: Sequence[tuple[str, Attachment]],
    rows: Sequence[RowNames],
    model: PreTrainedModel,
    sites: Sites,
) -> Iterator[None]:
    """Let each adapter act in its rows only, inside a `with` block.

    Args:
        parts: all that is attached, by the name of its adapter.
        rows: the names of each row, all of them known.
        model: the model they are attached to.
        sites: its map.

    Raises:
        MethodError: there are no rows, or an adapter of some acts on whole batches only.
    """
    if not rows:
        raise MethodError("rows: there are none; give the name of an adapter, or None, for each")
    with ExitStack() as undo:
        undo.enter_context(_backward_inside(model.get_submodule(sites.backbone)))
        for name, attachment in parts:
            mask = torch.tensor([name in names_of(row) for row in rows])
            if mask.any():
                _require_one_stack(attachment, sites)
            undo.enter_context(_in_rows(attachment, mask.to(model.device)))
        yield


def _require_one_stack(attachment: Attachment, sites: Sites) -> None:
    """Raise MethodError where a decoder would attend to prompts of several lengths."""
    children = attachment.children.values() if isinstance(attachment, ChildAttachment) else ()
    attends = len({block.stack for block in sites.blocks}) > 1
    if attends and any(isinstance(child, InputRows) for child in children):
        raise MethodError(
            "rows: prompts before the input are not chosen by row on encoder-decoders, whose "
            "decoder attends to them; use() one adapter at a time, or prefix_tuning"
        )


@contextmanager
def _backward_inside(backbone: nn.Module) -> Iterator[None]:
    """Refuse, where blocks are checkpointed, a backward pass after the `with` block.

    It computes the blocks again, and then for other rows than the forward pass did.
    """
    if not any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()):
        yield
        return
    over = False

    def check(gradient: Tensor) -> None:
        if over:
            raise MethodError(
                "rows: gradient checkpointing computes the forward pass again, and rows() is over; "
                "call backward() inside its `with` block"
            )

    def watch(module: nn.Module, args: Any, output: ModelOutput) -> None:
        for value in output.values():
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(check)  # type: ignore[no-untyped-call]

    handle = backbone.register_forward_hook(watch)
    try:
        yield
    finally:
        over = True
        handle.remove()


@contextmanager
def _in_rows(attachment: Attachment, mask: Tensor) -> Iterator[None]:
    """Let `attachment` act in the rows of `mask` (batch,) bool, inside a `with` block."""
    before, used = attachment.enabled, bool(mask.any())
    attachment.enable(used)
    try:
        if used:
            attachment.choose_rows(mask)
        yield
    finally:
        attachment.choose_rows(None)
        attachment.enable(before)
