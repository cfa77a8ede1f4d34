"""Small networks on the branches of a block: what Adapter and Compacter share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import MethodError
from tunesmith.methods.child import Child, ChildAttachment, require_free
from tunesmith.methods.gate import Gate

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from tunesmith.models.sites import Block, Sites

Activation = Literal["relu", "gelu", "silu", "tanh"]
Init = Literal["identity", "near_identity"]
Placement = Literal["houlsby", "pfeiffer", "parallel"]
Reads = Literal["branch", "block"]

ACTIVATIONS: Final[Mapping[Activation, Callable[[Tensor], Tensor]]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Reader(Child):
    """Keeps what goes into its module until the parallel adapter of the block has taken it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def register_on(self, parent: nn.Module) -> RemovableHandle:
        """Register the hook that sees what goes into `parent`."""
        return parent.register_forward_pre_hook(self.before)

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the first of the positional `args`."""
        if self.enabled:
            self.seen = args[0]

    def take(self) -> Tensor:
        """Return what was seen, and keep it no longer."""
        seen, self.seen = self.seen, None
        assert seen is not None, "the feed-forward's first map runs before its output"  # noqa: S101
        return seen


class Bottleneck(Child):
    """h + s up(f(down(x))), where x is h itself, or what `reader` has seen.

    Args:
        down: from the model's width to the bottleneck.
        up: back.
        activation: f.
        norm: normalises x first.
        scale: s; a parameter (1,) where it is learned.
    """

    def __init__(
        self,
        down: nn.Module,
        up: nn.Module,
        *,
        activation: Activation,
        norm: LayerNorm | None = None,
        scale: float | nn.Parameter = 1.0,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.down = down
        self.up = up
        self.activation = ACTIVATIONS[activation]
        self.scale = scale
        # In a tuple, or it would be a part of this module as well as of its own parent.
        self._reader: tuple[Reader, ...] = ()
        self.token_gate: Gate | None = None
        """How much of the change acts at each token; None is all of it."""
        self.on_norm = False
        """Whether it hangs under the norm that ends its block, and changes what goes into it."""

    def read_from(self, reader: Reader) -> None:
        """Take x from `reader` from now on."""
        self._reader = (reader,)

    def change(self, x: Tensor) -> Tensor:
        """Return s up(f(down(x))) for x (..., width), in x's dtype."""
        normed = x if self.norm is None else self.norm(x)
        scale = self.scale.to(x.dtype) if isinstance(self.scale, Tensor) else self.scale
        change: Tensor = scale * self.up(self.activation(self.down(normed)))
        return change if self.token_gate is None else self.token_gate(x) * change

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        """Return h + s up(f(down(x))) for h = `output` (..., width).

        Under a norm it is norm(z + s up(f(down(h)))) for the norm's input z.
        """
        if isinstance(output, tuple):  # some blocks put out more than their hidden states
            return (self.act(module, args, output[0]), *output[1:])
        if self.on_norm:
            z: Tensor = args[0]
            return module.forward(z + self.change(output).to(z.dtype))
        x = self._reader[0].take() if self._reader else output
        return output + self.change(x).to(output.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation with float32 parameters, for x of any dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., width) normalised, in its dtype."""
        up = x.to(self.weight.dtype)
        return F.layer_norm(up, self.weight.shape, self.weight, self.bias).to(x.dtype)


def bottlenecks(
    model: nn.Module,
    sites: Sites,
    placement: Placement,
    make: Callable[[int], Bottleneck],
    *,
    reads: Reads = "branch",
    attribute: str,
    name: str,
) -> dict[str, Child]:
    """Return the children that put a bottleneck on the branches of every block, by path.

    houlsby: on the outputs of attention, of attention over an encoder, and of the feed-forward,
        before they join the residual.
    pfeiffer: on the feed-forward's output only.
    parallel: beside the feed-forward: from its input to its output (He et al. 2022).

    Args:
        model: the base model.
        sites: its map.
        placement: where.
        make: gives a bottleneck for a width.
        reads: with pfeiffer, whether x is the branch's output, or what the whole block puts out.
        attribute: what the children are called.
        name: the adapter's name, for errors.

    Raises:
        MethodError: the attribute is taken, or parallel has no input to read.
    """
    children: dict[str, Child] = {}
    for block in sites.blocks:
        width = _width(block)
        if placement == "houlsby":
            for branch in block.branches[:-1]:
                children[f"{branch}.{attribute}"] = make(width)
        last = make(width)
        end = block.mlp_out if reads == "branch" else _end_of(block, sites)
        last.on_norm = end in block.norms and reads == "block"
        children[f"{end}.{attribute}"] = last
        if placement == "parallel":
            reader = Reader()
            # Under a name of its own: a mixture's input and output are those of one module.
            children[f"{_feed_forward(block, sites)}.{attribute}_input"] = reader
            last.read_from(reader)
    for path, child in children.items():
        parent, _, own = path.rpartition(".")
        require_free(model, parent, own, name)
        child.to(next(model.get_submodule(parent).parameters()).device)
    return children


def _end_of(block: Block, sites: Sites) -> str:
    """Return the module that puts out all of `block`: itself, or the norm that it ends with."""
    ends_with_norm = sites.final_norm is None
    return block.norms[-1] if ends_with_norm else block.path


def _width(block: Block) -> int:
    """Return the width of the residual stream: what the attention puts out."""
    return next(site.out_features for site in block.sites if site.name == "attention.o")


def _feed_forward(block: Block, sites: Sites) -> str:
    """Return the module whose input is the feed-forward's: its first linear map, or a mixture.

    Raises:
        MethodError: there is none.
    """
    for site in block.sites:
        if site.name == "mlp.up":
            return block.mlp_out if site.kind == "experts" else site.module
    raise MethodError(
        f"method.placement: parallel reads the input of mlp.up, which {block.path} of this "
        f"{sites.model_type} does not have; use pfeiffer"
    )


def bottleneck_size(width: int, *, size: int | None, reduction_factor: int) -> int:
    """Return `size`, or the width divided by the reduction factor.

    Raises:
        MethodError: nothing is left of the width.
    """
    if size is not None:
        return size
    if width < reduction_factor:
        raise MethodError(
            f"method.reduction_factor: {reduction_factor} leaves nothing of the model's width "
            f"{width}; use at most {width}, or set method.bottleneck"
        )
    return width // reduction_factor


class BottleneckAttachment(ChildAttachment):
    """Bottlenecks on one model that start as nothing."""

    def merge(self) -> None:
        """Refuse.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            "an adapter has an activation between its two maps, so no weight of the base can take "
            "it in; keep it beside the base, or use lora or ia3, which merge"
        )


class NearIdentity(BottleneckAttachment):
    """Bottlenecks on one model that start as almost nothing."""

    identity_at_start = False


def attach_bottlenecks(
    model: nn.Module, children: Mapping[str, Child], init: Init
) -> BottleneckAttachment:
    """Hang `children` on the model; `init` says whether they start as nothing."""
    kind = BottleneckAttachment if init == "identity" else NearIdentity
    return kind(model, children)
