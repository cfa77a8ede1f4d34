"""ReFT: edits of hidden representations in a subspace (Wu et al. 2024, arXiv:2404.03592)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.child import Child, ChildAttachment, require_free
from tunesmith.methods.contract import Method
from tunesmith.methods.prefix import join, stack_path

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from tunesmith.models.family import Stack
    from tunesmith.models.sites import Block, Sites


class ReFT(Method):
    """Edit what blocks put out, in a learned subspace: h + R^T (W h + b - R h).

    The paper edits the first and last tokens of the prompt. Which token is the prompt's last is not
    known where rows are packed or a reply stands behind it, so here the choice is all tokens, the
    reply's too (as pyreft's "all"), or the first ones of every text.
    """

    default_learning_rate: ClassVar[float] = 2.5e-3

    name: Literal["reft"] = "reft"
    """Edits of hidden representations."""
    rank: int = Field(default=8, ge=1)
    """r, the dimensions of the subspace; 8 for LLaMA's commonsense tasks in the paper, 4 for others
    and 1 for classification."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | Literal["all"] = (
        "all"
    )
    """Blocks whose output is edited, counted from 0; in an encoder-decoder of both stacks."""
    positions: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """How many tokens at the start of a text are edited, or all."""
    variant: Literal["loreft", "direft"] = "loreft"
    """loreft: R has orthonormal rows, and R h becomes W h + b (eq. 2). direft, the paper's cheaper
    ablation: h + R^T (W h + b) without either (eq. 3)."""

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> ReftAttachment:
        """Hang an edit under every chosen block.

        Raises:
            MethodError: there is no such block, the rank exceeds the width, or the name is taken.
        """
        attribute = f"reft_{name}"
        kind = LoReFT if self.variant == "loreft" else DiReFT
        chosen = list(self._blocks(sites))
        starts: dict[Stack, Start] = {}
        if self.positions != "all":
            stacks = dict.fromkeys(block.stack for block in chosen)
            starts = {stack: Start(self.positions) for stack in stacks}
        children: dict[str, Child] = {}
        for block in chosen:
            edit = kind(self._width(block), self.rank, starts.get(block.stack))
            device = next(model.get_submodule(block.path).parameters()).device
            children[join(block.path, attribute)] = edit.to(device)
        children |= {join(stack_path(sites, s), attribute): start for s, start in starts.items()}
        for path in children:
            require_free(model, path.rpartition(".")[0], attribute, name)
        return ReftAttachment(model, children)

    def _blocks(self, sites: Sites) -> Iterator[Block]:
        """Yield the blocks whose output is edited."""
        known = 1 + max(block.index for block in sites.blocks)
        if self.layers != "all" and (beyond := [i for i in self.layers if i >= known]):
            raise MethodError(
                f"method.layers: there is no block {beyond[0]}; this {sites.model_type} has blocks "
                f"0 to {known - 1}"
            )
        for block in sites.blocks:
            if self.layers == "all" or block.index in self.layers:
                yield block

    def _width(self, block: Block) -> int:
        """Return the width of the residual stream: what the attention puts out."""
        width = next(site.out_features for site in block.sites if site.name == "attention.o")
        if self.rank > width:
            raise MethodError(
                f"method.rank: {self.rank} dimensions do not fit into a width of {width}; use at "
                f"most {width}"
            )
        return width


class Start(Child):
    """Knows which tokens are among the first `count` of their text; hangs under a stack of blocks.

    It is asked again when a checkpointed block is computed anew, so between a forward pass that is
    switched on and its backward pass there must be no other one.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.near: Tensor | None = None

    def register_on(self, parent: nn.Module) -> RemovableHandle:
        """Register the hook on what goes into the stack."""
        return parent.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the tokens of this forward pass that are at the start of their text."""
        if not self.enabled:
            return
        names = list(inspect.signature(module.forward).parameters)
        inputs = dict(zip(names, args, strict=False)) | kwargs
        self.near = (places_in_text(inputs) < self.count)[..., None]

    def of(self, h: Tensor) -> Tensor:
        """Return 1 for the tokens of `h` (batch, length, width) that are near the start, else 0.

        Raises:
            MethodError: the sequence is not the one that was announced.
        """
        near = self.near
        if near is None or near.shape[1] != h.shape[1]:
            raise MethodError(
                "method.positions: rows were put before the text after reft had counted its "
                "tokens; list prompt_tuning or p_tuning before reft, or use positions: all"
            )
        return near.to(h.dtype)


def places_in_text(inputs: dict[str, Any]) -> Tensor:
    """Return the place of each token in its own text, (batch or 1, length) int64.

    Neither padding nor another segment counts, and what is in the cache does.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs["inputs_embeds"] if tokens is None else tokens
    length, device = tokens.shape[1], tokens.device
    index = torch.arange(length, device=device)
    if (bounds := inputs.get("cu_seq_lens_q")) is not None:
        starts = bounds[:-1].to(device, torch.int64)
        return (index - starts[torch.bucketize(index, starts, right=True) - 1])[None]
    mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return (index + (0 if cache is None else cache.get_seq_length()))[None]


class Edit(Child):
    """Hangs under a block and edits its output h.

    Args:
        width: of h.
        rank: r.
        start: says which tokens are edited; None is all.
    """

    def __init__(self, width: int, rank: int, start: Start | None) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.empty(rank, width, dtype=torch.float32))
        self.W = nn.Parameter(torch.empty(rank, width, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
        self._start = () if start is None else (start,)  # in a tuple, or it would be a part of this

    def change(self, h: Tensor) -> Tensor:
        """Return what is added to h (batch, length, width), in its dtype."""
        raise NotImplementedError

    def act(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the block's `output` with h edited: h itself, or a tuple that begins with it."""
        h: Tensor = output[0] if isinstance(output, tuple) else output
        change = self.change(h)
        edited = h + (change * self._start[0].of(h) if self._start else change)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


class LoReFT(Edit):
    """Phi(h) = h + R^T (W h + b - R h), where the rows of R are orthonormal (eq. 2).

    The authors start W at random. It starts as R here, so that the model starts as the base.
    """

    def __init__(self, width: int, rank: int, start: Start | None) -> None:
        super().__init__(width, rank, start)
        nn.init.orthogonal_(self.R)
        with torch.no_grad():
            self.W.copy_(orthonormal_rows(self.R))

    def change(self, h: Tensor) -> Tensor:
        """Return R^T ((W - R) h + b)."""
        R = orthonormal_rows(self.R)
        inside = F.linear(h, (self.W - R).to(h.dtype), self.b.to(h.dtype))
        return F.linear(inside, R.t().to(h.dtype))


class DiReFT(Edit):
    """Phi(h) = h + R^T (W h + b), with W_2 = R and W_1 = W in the paper's letters (eq. 3).

    As with LoRA one of the two starts at zero, so that the model starts as the base.
    """

    def __init__(self, width: int, rank: int, start: Start | None) -> None:
        super().__init__(width, rank, start)
        nn.init.zeros_(self.R)
        nn.init.kaiming_uniform_(self.W, a=math.sqrt(5))

    def change(self, h: Tensor) -> Tensor:
        """Return R^T (W h + b)."""
        inside = F.linear(h, self.W.to(h.dtype), self.b.to(h.dtype))
        return F.linear(inside, self.R.t().to(h.dtype))


def orthonormal_rows(A: Tensor) -> Tensor:
    """Return the orthonormal rows (rank, width) that Gram-Schmidt makes of those of A, in order.

    By A^T = Q T with a positive diagonal of T, which makes Q unique and its gradient smooth.
    """
    with torch.autocast(A.device.type, enabled=False):
        Q, T = torch.linalg.qr(A.t())
        return (Q * T.diagonal().sign()).t()


class ReftAttachment(ChildAttachment):
    """Edits on one model."""

    def merge(self) -> None:
        """Refuse.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            "reft edits the sum that runs past all weights from block to block, so no weight of "
            "the base can take it in; save the adapter and load it beside the base"
        )
