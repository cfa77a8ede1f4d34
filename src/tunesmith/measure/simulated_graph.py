"""A block as the graphs that PyTorch's compiler makes of it, for a simulated step.

What a compiled block keeps for its backward pass is decided by the compiler's partitioner: it cuts
the joint graph of both passes where the least has to be kept, and computes pointwise operations
again (Chen et al. 2016, arXiv:1604.06174, as a minimum cut). The same partitioner is asked here,
without a GPU and without generating code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from tunesmith.measure.simulated_memory import uncounted

if TYPE_CHECKING:
    from torch.fx.node import Node

Graphs: TypeAlias = dict[tuple[Any, ...], Callable[..., Any] | None]
"""The graphs of blocks by what they take; None for those that are no single graph."""


class SimulatedGraph:
    """One block's call as a compiled one has it; blocks of one kind share their graphs.

    Args:
        block: on the meta device, or where tensors have no data by the time it is called.
        graphs: of the blocks before.
    """

    def __init__(self, block: nn.Module, graphs: Graphs) -> None:
        self._block = block
        self._graphs = graphs
        self._mark: Callable[[fx.Graph], None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block's graph, or the block as it is where it is no single graph."""
        reached = _reached(self._block)
        held = {**dict(reached.named_parameters()), **dict(reached.named_buffers())}
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [*held.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        kinds = (str(structure), *map(_kind, leaves), *map(_kind, tensors))
        key = (type(self._block), self._mark, *held, *kinds)
        if key not in self._graphs:
            cut = partial(_partitioned, self._mark)
            given = (leaves, structure)
            self._graphs[key] = _traced(reached, list(held), given, tensors, cut=cut)
        graph = self._graphs[key]
        if graph is None:
            return self._block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return graph(*tensors)

    def make_dynamic(self) -> None:
        """Nothing: every row of a plan is as long as the longest."""

    def mark(self, mark: Callable[[fx.Graph], None] | None) -> None:
        """Let `mark` say what is kept for the backward pass; None leaves it to the partitioner."""
        self._mark = mark


def _reached(block: nn.Module) -> nn.ModuleList:
    """Return `block` with the modules outside of it that it computes with.

    What all blocks share, such as VeRA's A and B, its children hold in a tuple, so that it is not
    a child of each.
    """
    inside = set(block.modules())
    values = (value for module in block.modules() for value in vars(module).values())
    held = (each for value in values if isinstance(value, tuple) for each in value)
    shared = (each for each in held if isinstance(each, nn.Module) and each not in inside)
    return nn.ModuleList([block, *dict.fromkeys(shared)])


def _kind(value: object) -> object:
    """Return what a graph takes for a constant of an argument."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.requires_grad)
    return repr(value) if isinstance(value, int | float | str | None) else type(value)


def _traced(
    reached: nn.ModuleList,
    names: Sequence[str],
    given: tuple[Sequence[Any], Any],
    tensors: Sequence[Tensor],
    *,
    cut: Callable[..., Any],
) -> Callable[..., Any] | None:
    """Return both passes of a block as graphs behind one function of its tensors.

    Args:
        reached: the block, which is traced, and what it computes with besides.
        names: of its parameters and buffers, the first of `tensors`.
        given: the leaves and the structure of the call's arguments.
        tensors: parameters, buffers, and those of the leaves that are tensors.
        cut: makes the graphs of both passes from their joint graph.
    """
    # The compiler is slow to import, and training does not need this part of it.
    from torch._inductor.decomposition import select_decomp_table

    leaves, structure = given
    block = reached[0]

    def call(*tensors: Tensor) -> Any:
        held = dict(zip(names, tensors, strict=False))
        own = iter(tensors[len(names) :])
        filled = [next(own) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(filled, structure)
        with _reparametrize_module(reached, held):
            return block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    graph: Callable[..., Any] = aot_function(
        call,
        fw_compiler=_compiled,
        bw_compiler=_compiled,
        partition_fn=cut,
        decompositions=select_decomp_table(),
    )
    fake = next(tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor))
    # Hooks of our own, so that checkpointing does not take the compiler's tensors for the block's.
    with uncounted(), _disable_current_modes(), fake, saved_tensors_hooks(_same, _same):
        empty = [torch.empty_like(t).detach().requires_grad_(t.requires_grad) for t in tensors]
        try:
            graph(*empty)
        # Whatever PyTorch cannot trace runs uncompiled in training too. An assertion is of a tensor
        # that is neither the block's nor given, and would be a constant of the graph.
        except (RuntimeError, AssertionError):
            return None
    return graph


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _partitioned(
    mark: Callable[[fx.Graph], None] | None,
    joint: fx.GraphModule,
    inputs: Sequence[Any],
    **facts: Any,
) -> Any:
    """Return the graphs of both passes, cut where the compiler cuts."""
    changes: Any = torch._inductor.config.joint_custom_pre_pass  # as the engine sets it
    if changes is None:
        changes = ()
    for change in changes if isinstance(changes, list | tuple) else (changes,):
        change(joint.graph)
    if mark is not None:
        from torch._inductor.fx_passes.replace_random import replace_random_passes
        from torch._inductor.virtualized import V

        with V.set_fake_mode(detect_fake_mode(inputs)):
            replace_random_passes(joint)  # marks expect seeds in the place of random numbers
        mark(joint.graph)
    cut = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **facts)
    if any(node.op == "get_attr" for node in cut[1].graph.nodes):
        # The compiler copies it later on, where nothing has data; such a block is planned as it is.
        raise RuntimeError("the graph of the backward pass holds a tensor of its own")
    return cut


def _compiled(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """Return what runs `gm` with the memory that generated code would take."""
    del example_inputs
    written = _written(gm.graph)

    def run(args: list[Any]) -> Any:
        return _Fused(gm, written).boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]  # it lets go of what it is given
    return run


class _Fused(fx.Interpreter):
    """Runs a graph and counts only what fused kernels write to memory."""

    def __init__(self, graph: fx.GraphModule, written: set[Node]) -> None:
        super().__init__(graph)
        self._written = written
        self.user_to_last_uses = _last_uses(graph.graph, written)

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        if n in self._written:
            return super().run_node(n)
        with uncounted():
            return super().run_node(n)


def _last_uses(graph: fx.Graph, written: set[Node]) -> dict[Node, list[Node]]:
    """Return what can be let go of after each node.

    What is not written is computed where it is read, so what it reads has to stay until then.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    until: dict[Node, Node] = {}
    for node in reversed(graph.nodes):
        readers = [user if user in written else until[user] for user in node.users]
        until[node] = max(readers, key=places.__getitem__, default=node)
    found: dict[Node, list[Node]] = {}
    for node, last in until.items():
        if node.op != "output":
            found.setdefault(last, []).append(node)
    return found


def _written(graph: fx.Graph) -> set[Node]:
    """Return the nodes whose values are written to memory.

    A pointwise operation is computed inside the kernel of what reads it, but for products, sums
    over more than a kernel's part, and what leaves the graph.
    """
    return {node for node in graph.nodes if not _fuses(node) or any(map(_needs, node.users))}


def _fuses(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags


def _needs(reader: Node) -> bool:
    """Return whether `reader` takes its arguments from memory."""
    if _is_view(reader):
        return any(map(_needs, reader.users))
    return not _fuses(reader) and reader.target not in _REDUCTIONS


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.alias_info is not None for a in schema.arguments)


_REDUCTIONS = {
    torch.ops.aten.sum.dim_IntList,
    torch.ops.aten.sum.default,
    torch.ops.aten.mean.dim,
    torch.ops.aten.amax.default,
    torch.ops.aten.var_mean.correction,
}
