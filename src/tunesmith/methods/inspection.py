"""What a trained adapter came to be, in numbers: sizes of changes, ranks kept, tokens nearby."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tunesmith.methods.adalora import AdaLoraAttachment, SingularTriplets
from tunesmith.methods.child import Child, ChildAttachment
from tunesmith.methods.composed import ComposedAttachment
from tunesmith.methods.contract import Attachment
from tunesmith.methods.diff_pruning import Diff
from tunesmith.methods.low_rank import LowRank
from tunesmith.methods.places import linear_features
from tunesmith.methods.prefix import InFront
from tunesmith.methods.prompt_tuning import PromptAttachment
from tunesmith.methods.vera import ScaledProjection


@torch.no_grad()
def delta_norms(attachment: Attachment) -> dict[str, float]:
    """Return the Frobenius norm of what is added to each weight, by the path of its module.

    Of low-rank methods and diff pruning; of DoRA it is its low-rank part s B A.
    """
    return {
        path: float(torch.linalg.vector_norm(delta.double())) for path, delta in _deltas(attachment)
    }


def _deltas(attachment: Attachment) -> Iterator[tuple[str, Tensor]]:
    """Yield path and delta (out, in) of each weight that something is added to."""
    for path, child in _children(attachment):
        parent = path.rpartition(".")[0]
        if isinstance(child, LowRank):
            yield parent, child.delta()
        elif isinstance(child, SingularTriplets | ScaledProjection | Diff):
            # All of them are W + delta, so of W = 0 there remains the delta.
            yield parent, child.merged(_nothing(attachment, parent))


def _nothing(attachment: Attachment, path: str) -> Tensor:
    """Return zeros (out, in) in the shape of the weight of the linear map at `path`."""
    assert isinstance(attachment, ChildAttachment)  # noqa: S101 - it has children
    module = attachment.model.get_submodule(path)
    in_features, out_features = linear_features(path, module)
    return torch.zeros(out_features, in_features, device=module.get_parameter("weight").device)


@torch.no_grad()
def prefix_norms(attachment: Attachment) -> dict[str, tuple[float, float]]:
    """Return the mean length of a prefix's keys and of its values, by the path of the layer.

    Over positions and heads.
    """
    found = {}
    for path, child in _children(attachment):
        if isinstance(child, InFront):
            K, V = child.pair()
            found[path.rpartition(".")[0]] = (_mean_length(K), _mean_length(V))
    return found


def _mean_length(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float(), dim=-1).mean())


def kept_ranks(attachment: Attachment) -> dict[str, int]:
    """Return how many singular values AdaLoRA kept in each module; empty for other methods."""
    return attachment.ranks() if isinstance(attachment, AdaLoraAttachment) else {}


def changed_share(attachment: Attachment) -> float | None:
    """Return the share of elements that diff pruning changed; None for other methods."""
    parts = [
        part
        for _, child in _children(attachment)
        if isinstance(child, Diff)
        for _, part in child.parts()
    ]
    if not parts:
        return None
    changed = sum(int(part.at_rest().count_nonzero()) for part in parts)
    return changed / sum(part.w.numel() for part in parts)


def nearest_tokens(attachment: Attachment, count: int) -> list[list[tuple[int, float]]]:
    """Return the nearest tokens of each row of a prompt, with their cosine; empty for others."""
    if not isinstance(attachment, PromptAttachment):
        return []
    with torch.no_grad():
        return attachment.nearest_tokens(count)


def _children(attachment: Attachment) -> Iterator[tuple[str, Child]]:
    """Yield path and child of all that an attachment hung into the model."""
    if isinstance(attachment, ChildAttachment):
        yield from attachment.children.items()
    if isinstance(attachment, ComposedAttachment):
        for part in attachment.parts.values():
            yield from _children(part)
