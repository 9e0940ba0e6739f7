"""The graphs of a model, Dynamo's own and those inside of higher-order operators, and how values get from one into another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.graph.capture import Body, bodies, capture_body, drop_dead_code
from attn_compiler.graph.symbolic import SymbolicReader

_ANCHOR = re.compile(r"softmax|attention|exp|transformer")
_OPENED = ("tag_activation_checkpoint",)  # these run their body once, on the operands in their order


@dataclass
class Part:
    """A captured graph and how it is read; `body` and `outer` say where it stands in another."""

    graph: fx.GraphModule
    reader: SymbolicReader
    body: Body | None = None
    outer: Part | None = None
    _passed: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def blocked(self) -> str:
        """Why nothing in here is rewritten; empty if it can be."""
        inside = self.body and str(self.body.node.target)
        if inside and inside not in _OPENED:
            return f"it stands inside of `{inside}`, whose body is left as it is"
        return self.outer.blocked if self.outer else ""

    def reach(self, node: fx.Node) -> fx.Node:
        """A node of the outermost graph as this graph sees it: it becomes an operand of the operators in between."""
        if self.outer is None or self.body is None:
            return node
        if node not in self._passed:
            operand = self.outer.reach(node)
            self.body.node.args = (*self.body.node.args, operand)
            self._passed[node] = private.pass_in(self.graph, operand)
        return self._passed[node]

    def put_back(self) -> None:
        """Let the operator run this graph in place of the one it had; operands that nobody reads any more disappear."""
        if self.outer is None or self.body is None:
            return
        operator, graph = self.body.node, self.outer.graph
        used = []
        for place, operand in zip(self.graph.graph.find_nodes(op="placeholder"), operator.args[1:], strict=True):
            if place.users:
                used.append(operand)
            else:
                self.graph.graph.erase_node(place)
        self.graph.recompile()
        name = f"attn_body_{sum(1 for _ in graph.children())}"
        graph.add_module(name, self.graph)
        with graph.graph.inserting_before(operator):
            operator.args = (graph.graph.get_attr(name), *used)
        drop_dead_code(graph)
        graph.delete_all_unused_submodules()
        graph.recompile()


def parts(captured: fx.GraphModule) -> Iterator[Part]:
    """Yield a captured graph and the graphs inside of it that could hold an attention, the outer ones first."""
    whole = Part(captured, SymbolicReader(captured))
    yield whole
    yield from _inside(whole)


def has_anchor(gm: fx.GraphModule) -> bool:
    """Whether a graph that Dynamo made could hold an attention at all; most do not, and are not looked at any further."""
    return any(_ANCHOR.search(str(node.target).lower()) for node in gm.graph.nodes if node.op.startswith("call_")) or any(
        isinstance(module, fx.GraphModule) and has_anchor(module) for module in gm.children()
    )


def _inside(outer: Part) -> Iterator[Part]:
    for body in [body for body in bodies(outer.graph) if has_anchor(body.module)]:
        graph = capture_body(body)
        pairs = zip(graph.graph.find_nodes(op="placeholder"), body.operands, strict=bool(body.operands))
        kept = ((place, x) for place, x in pairs if outer.reader.versions.read(x, body.node) is x)
        seen = {place: (outer.reader, operand) for place, operand in kept}
        part = Part(graph, SymbolicReader(graph, placeholders=seen), body, outer)
        yield part
        yield from _inside(part)
