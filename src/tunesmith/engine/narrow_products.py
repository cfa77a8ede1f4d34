"""Low-rank products that share an operand, as one product: a pass over the graph of a block.

Beside q, k and v, or gate and up, LoRA multiplies the same x by a narrow A each. Such a product
takes as long as reading x does, so three of them cost three readings; and what they add to the
gradient by x is written and read three times. On the joint graph of forward and backward pass,

    x A1, x A2        become   x (A1 | A2)
    D1 x, D2 x        become   (D1 ; D2) x
    ... + D1 A1 + D2 A2   become   ... + (D1 | D2) (A1 ; A2)

where the side that differs is narrow, whichever method it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

NARROW: Final = 128
"""Columns up to which a product takes no longer than reading its wide operand does."""
_ATEN: Final = torch.ops.aten
_VIEWS: Final = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)
_TRANSPOSES: Final = (_ATEN.t.default, _ATEN.permute.default, _ATEN.transpose.int)


class MergeNarrowProducts(CustomGraphPass):
    """The pass, for `torch._inductor.config.joint_custom_pre_pass`."""

    def __call__(self, graph: Graph) -> None:
        """Merge what can be merged in `graph`, in its place."""
        late = nodes_after(node for node in graph.nodes if "tangents" in str(node.target))
        for group in _groups(_products(graph), lambda mm: _shared_left(mm, late)):
            _merge_columns(graph, group)
        for group in _groups(_products(graph), lambda mm: _shared_right(mm, late)):
            _merge_rows(graph, group)
        for group in _groups(_products(graph), _summed_into):
            _merge_terms(graph, group)
        stable_topological_sort(graph)  # what is joined may come later than its first use
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """Return what tells this version from others in the compiler's cache."""
        return get_hash_for_files((__file__,))


def _products(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.target is _ATEN.mm.default]


def _groups(nodes: Iterable[Node], key: Callable[[Node], Any]) -> list[list[Node]]:
    """Return those of one key together, where they are several and none needs another."""
    found: dict[Any, list[Node]] = {}
    for node in nodes:
        if (its := key(node)) is not None:
            found.setdefault(its, []).append(node)
    return [group for group in found.values() if len(group) > 1 and _independent(group)]


def _independent(group: list[Node]) -> bool:
    after = nodes_after(group)
    return not any(node in after for node in group)


def nodes_after(nodes: Iterable[Node]) -> set[Node]:
    """Return everything that needs one of `nodes`."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def _shared_left(mm: Node, late: set[Node]) -> Any:
    """Return what x A1 and x A2 have in common: x, and the pass they belong to."""
    left, right = _operands(mm)
    if not _is_narrow(_shape(right)[1]) or _is_narrow(_shape(left)[1]):
        return None
    return _origin(left), str(_shape(left)), _dtype(mm), mm in late


def _shared_right(mm: Node, late: set[Node]) -> Any:
    """Return what D1 x and D2 x have in common."""
    left, right = _operands(mm)
    if not _is_narrow(_shape(left)[0]) or _is_narrow(_shape(right)[1]):
        return None
    return _origin(right), str(_shape(right)), _dtype(mm), mm in late


def _summed_into(mm: Node) -> Any:
    """Return the sum that D1 A1 and D2 A2 go into and nowhere else."""
    left, _ = _operands(mm)
    if not _is_narrow(_shape(left)[1]):
        return None
    root, above = None, _sum_of(mm)
    while above is not None:
        root, above = above, _sum_of(above)
    return None if root is None else (root, str(_shape(mm)), _dtype(mm))


def _sum_of(node: Node) -> Node | None:
    """Return the sum of two that is all that `node` is used for, perhaps in another shape."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in _VIEWS:
            node = user
            continue
        plain = user.target is _ATEN.add.Tensor and not user.kwargs and len(user.args) == 2
        if not plain or user.args[0] is user.args[1]:
            return None
        alike = all(
            isinstance(term, Node)
            and str(_shape(term)) == str(_shape(user))
            and _dtype(term) == _dtype(user)
            for term in user.args
        )
        return user if alike else None
    return None


def _merge_columns(graph: Graph, group: list[Node]) -> None:
    """Put x (A1 | A2) in the place of x A1 and x A2."""
    rights = [_operands(mm)[1] for mm in group]
    with graph.inserting_before(group[0]):
        joined = _beside(graph, rights)
        whole = _made(graph, _ATEN.mm.default, _operands(group[0])[0], joined)
        _hand_out(graph, whole, group, dim=1)


def _merge_rows(graph: Graph, group: list[Node]) -> None:
    """Put (D1 ; D2) x in the place of D1 x and D2 x."""
    lefts = [_operands(mm)[0] for mm in group]
    with graph.inserting_before(group[0]):
        joined = _above(graph, lefts)
        whole = _made(graph, _ATEN.mm.default, joined, _operands(group[0])[1])
        _hand_out(graph, whole, group, dim=0)


def _merge_terms(graph: Graph, group: list[Node]) -> None:
    """Put (D1 | D2) (A1 ; A2) in the place of the first term, and leave out the others."""
    first, *others = group
    lefts, rights = zip(*(_operands(mm) for mm in group), strict=True)
    with graph.inserting_before(first):
        joined = _beside(graph, list(lefts)), _above(graph, list(rights))
        whole = _made(graph, _ATEN.mm.default, *joined)
    first.replace_all_uses_with(whole)
    for mm in others:
        term = mm
        while (user := next(iter(term.users))).target in _VIEWS:
            term = user
        rest = next(x for x in user.args if x is not term)
        user.replace_all_uses_with(rest)  # type: ignore[arg-type]  # a node, as `_sum_of` saw
        graph.erase_node(user)


def _beside(graph: Graph, parts: list[Node]) -> Node:
    """Return the matrices `parts` side by side; transposed ones stay so, which costs nothing."""
    under = [_untransposed(part) for part in parts]
    if any(node is None for node in under):
        return _made(graph, _ATEN.cat.default, parts, 1)
    return _made(graph, _ATEN.permute.default, _made(graph, _ATEN.cat.default, under, 0), [1, 0])


def _above(graph: Graph, parts: list[Node]) -> Node:
    """Return the matrices `parts` one above the other."""
    under = [_untransposed(part) for part in parts]
    if any(node is None for node in under):
        return _made(graph, _ATEN.cat.default, parts, 0)
    return _made(graph, _ATEN.permute.default, _made(graph, _ATEN.cat.default, under, 1), [1, 0])


def _hand_out(graph: Graph, whole: Node, group: list[Node], dim: int) -> None:
    """Put slices of `whole` in the place of the members of `group`."""
    start = 0
    for mm in group:
        stop = start + int(_shape(mm)[dim])
        mm.replace_all_uses_with(_made(graph, _ATEN.slice.Tensor, whole, dim, start, stop))
        start = stop


def _made(graph: Graph, target: Any, *args: Any) -> Node:
    """Return a new node that knows what its value looks like."""
    node = graph.call_function(target, args)
    values = torch.fx.map_arg(args, lambda x: x.meta["val"])
    node.meta["val"] = target(*values)
    return node


def _untransposed(node: Node) -> Node | None:
    if node.target not in _TRANSPOSES or len(_shape(node)) != 2:
        return None
    if node.target is _ATEN.permute.default and list(node.args[1]) != [1, 0]:  # type: ignore[arg-type]
        return None
    under = node.args[0]
    return under if isinstance(under, Node) else None


def _origin(node: Node) -> Node:
    """Return what `node` is a view or a copy of, in any shape."""
    while node.target in {*_VIEWS, _ATEN.clone.default}:
        node = node.args[0]  # type: ignore[assignment]  # views are of nodes
    return node


def _operands(mm: Node) -> tuple[Node, Node]:
    left, right = mm.args
    return left, right  # type: ignore[return-value]  # of a product they are nodes


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _dtype(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _is_narrow(size: Any) -> bool:
    return isinstance(size, int) and size <= NARROW
