"""What a reader sees of a tensor that is written in place: the graph's values, each written once, or a refusal."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from attn_compiler import torch_private as private
from attn_compiler.graph.axes import rearranges, source
from attn_compiler.graph.calls import call, is_tensor


class Versions:
    """Follows writes through a graph. Tensors that share memory are a family; a write through another member is not followed."""

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: place for place, node in enumerate(graph.nodes)}
        self._root: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)  # family: (written tensor, writer)
        self._root |= _aliases(graph)
        for node in graph.nodes:
            base = _shares_memory_with(node)
            if base is not None:
                self._root[node] = self._family(base)
            for tensor in _written(node):
                self._writes[self._family(tensor)].append((_whole(tensor), node))

    def _family(self, node: fx.Node) -> fx.Node:
        return self._root.get(node, node)

    def read(self, node: fx.Node, at: fx.Node) -> fx.Node | None:
        """The node that computes what `at` sees when it reads `node`; None where an alias was written in between."""
        current = node
        for tensor, writer in self._writes.get(self._family(node), ()):
            if writer is at or not self._position[node] < self._position[writer] < self._position[at]:
                continue
            if (tensor is not node and tensor is not current) or not is_tensor(writer):
                return None
            current = writer
        return current

    def written(self, node: fx.Node, after: fx.Node) -> fx.Node | None:
        """Who first writes to the memory of `node` after `after`."""
        later = (writer for _, writer in self._writes.get(self._family(node), ()) if self.precedes(after, writer))
        return min(later, key=self._position.__getitem__, default=None)

    def holds(self, node: fx.Node, after: fx.Node, until: fx.Node) -> bool:
        """Whether nobody writes to the memory of `node` after `after` and before `until`."""
        writer = self.written(node, after)
        return writer is None or not self.precedes(writer, until)

    def precedes(self, a: fx.Node, b: fx.Node) -> bool:
        return self._position[a] < self._position[b]


def _aliases(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Inputs that share memory with one before them."""
    first: dict[int, fx.Node] = {}
    tensors = [node for node in graph.find_nodes(op="placeholder") if is_tensor(node)]
    owners = {node: first.setdefault(_memory(node.meta["val"]), node) for node in tensors}
    return {node: owner for node, owner in owners.items() if owner is not node}


def _memory(x: torch.Tensor) -> int:
    """The same number for tensors that share memory, those included that stand for others while tracing."""
    try:
        return int(StorageWeakRef(x.untyped_storage()).cdata)  # type: ignore[no-untyped-call]
    except NotImplementedError:  # a tensor that is made of others
        return id(x)


def _whole(tensor: fx.Node) -> fx.Node:
    """The tensor that a slice takes all of: `x[:] = y` writes `x`."""
    while call(tensor).op == "slice" and rearranges(tensor):
        tensor = source(tensor)
    return tensor


def _shares_memory_with(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the result of `node` may share."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if not isinstance(node.target, private.Operator):
        return node.args[0] if getattr(node.target, "__name__", "") == "getitem" else None
    schema = private.schema(node.target)
    shares = any(result.alias_info is not None for result in schema.returns)
    maybe = torch.Tag.maybe_aliasing_or_mutating in node.target.tags
    return node.args[0] if shares or maybe else None


def _written(node: fx.Node) -> list[fx.Node]:
    if node.op != "call_function" or not isinstance(node.target, private.Operator):
        return []
    schema = private.schema(node.target)
    if not schema.is_mutable:
        return []
    named = {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}
    written = [named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    flat = [x for value in written for x in (value if isinstance(value, list | tuple) else (value,))]
    return [x for x in flat if isinstance(x, fx.Node)]
