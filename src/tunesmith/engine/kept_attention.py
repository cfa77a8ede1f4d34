"""What attention returned is kept, all else computed again: a mark on the graph of a block.

A compiled block's forward and backward pass are one graph at first, which PyTorch's partitioner
cuts in two where the least has to be kept (Chen et al. 2016, arXiv:1604.06174, as a minimum cut).
It heeds marks: here attention's results must be kept and everything else that the forward pass
computes must not. What the backward pass does not need, such as the block's last product, is not
computed again then: it is no part of the second graph, unlike of a block that is run a second time.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from tunesmith.engine.narrow_products import nodes_after
from tunesmith.engine.recompute import ATTENTION


class KeepAttention(CustomGraphPass):
    """The pass, for `torch._inductor.config.joint_custom_post_pass`.

    Of random numbers there is only the seed by then, which is kept. A block without an operator of
    attention keeps what goes into it.
    """

    def __call__(self, graph: Graph) -> None:
        """Mark the nodes of `graph`, in its place."""
        tangents = [node for node in graph.nodes if "tangents" in str(node.target)]
        late = nodes_after(tangents)
        if not tangents:  # there is no backward pass to keep anything for
            return
        for node in graph.nodes:
            if node.op == "call_function" and node not in late and _has_tensors(node):
                kept = _is_kept(node)
                policy = CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE
                node.meta["recompute"] = policy
                node.meta["ac_graph_id"] = 0  # all are of one region

    def __eq__(self, other: object) -> bool:
        """Two are the same, so that blocks share graphs."""
        return isinstance(other, KeepAttention)

    def __hash__(self) -> int:
        """Return the same of all."""
        return hash(KeepAttention)

    def uuid(self) -> Any:
        """Return what tells this version from others in the compiler's cache."""
        return get_hash_for_files((__file__,), ",".join(sorted(ATTENTION)))


def _is_kept(node: Node) -> bool:
    """Return whether `node` is attention's, or draws random numbers, which come only once."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return _is_kept(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    draws = torch.Tag.nondeterministic_seeded in node.target.tags
    return draws or node.target._schema.name in ATTENTION


def _has_tensors(node: Node) -> bool:
    """Return whether `node` computes tensors; sizes and checks are left to the partitioner."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return not mutates and any(isinstance(each, Tensor) for each in values)
