"""Carries out a plan: each site's code gives way to what its decision says. The only place that changes a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from attn_compiler.algebra.expr import i, k_len, q_len
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import Variant
from attn_compiler.graph import torch_private as private
from attn_compiler.graph.calls import Argument, shape
from attn_compiler.graph.capture import drop_dead_code
from attn_compiler.graph.layout import arranged, kv_groups, returned
from attn_compiler.graph.record import GraphSite
from attn_compiler.planning.site import Site
from attn_compiler.targets.operands import Operands, Positions
from attn_compiler.targets.torch_target import attend_torch

_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "seq_nr", "custom")


@dataclass(frozen=True)
class Replacement:
    """A site, what to compute in its place, and the nodes whose values are the tables of that variant."""

    found: GraphSite
    site: Site
    variant: Variant
    tables: Mapping[str, Argument]


def rewrite(gm: fx.GraphModule, replacements: Sequence[Replacement]) -> None:
    """Replace sites in place; what nobody reads any more, masks above all, disappears."""
    for replacement in replacements:
        _splice(gm.graph, replacement, _record(replacement))
    drop_dead_code(gm)
    gm.graph.lint()
    gm.recompile()


def _splice(graph: fx.Graph, replacement: Replacement, fragment: fx.GraphModule) -> None:
    """Copy `fragment` into `graph` in front of the site's output, and let its result stand for that output."""
    out = replacement.found.out.node
    inputs = iter(_inputs(replacement))
    copies: dict[fx.Node, Argument] = {}
    with graph.inserting_before(out):
        for node in fragment.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)
            elif node.op == "output":
                result = copies[node.args[0]]
            else:
                copy = graph.node_copy(node, copies.__getitem__)
                copy.meta.update({key: out.meta[key] for key in _PROVENANCE if key in out.meta})
                copies[node] = copy
    out.replace_all_uses_with(result)
    graph.erase_node(out)


def _inputs(replacement: Replacement) -> list[Argument]:
    found = replacement.found
    return [found.q.node, found.k.node, found.v.node, *replacement.tables.values()]


def _record(replacement: Replacement) -> fx.GraphModule:
    """The graph that computes a site's output from its operands and tables."""
    values = [private.known_value(x) if isinstance(x, fx.Node) else x for x in _inputs(replacement)]
    return private.retrace(_computation(replacement), values)


def _computation(replacement: Replacement) -> Callable[..., Tensor]:
    found, site, variant = replacement.found, replacement.site, replacement.variant
    wanted = (found.batch, found.heads, found.queries, found.depth)
    groups_k = kv_groups(found.k.axes, found.batch, found.kv_heads, found.keys, found.depth)
    groups_v = kv_groups(found.v.axes, found.batch, found.kv_heads, found.keys, found.width)
    out_shape, dtype = shape(found.out.node), found.out.node.meta["val"].dtype

    def compute(q: Tensor, k: Tensor, v: Tensor, *tables: Argument) -> Tensor:
        q = arranged(q, found.q.axes, wanted)
        k = arranged(k, found.k.axes, groups_k)
        v = arranged(v, found.v.axes, groups_v)
        given = {name: _tensor(x, q.device) for name, x in zip(replacement.tables, tables, strict=True)}
        operands = Operands(
            q, k, v, given, 0, 0, tuple(range(site.heads)), site.heads, site.kv_heads, site.layer or 0, site.layers or 1,
            training=variant.dropout > 0,
        )  # fmt: skip
        operands = replace(operands, q_positions=_positions(operands, site))
        out, _ = attend_torch(operands, variant)
        return returned(out, (*wanted[:3], found.width), found.out.axes, out_shape).to(dtype)

    return compute


def _tensor(x: Argument, device: torch.device) -> Tensor:
    """A table that is a number in the graph (a symbolic size, a float that is an input) as a tensor."""
    return x if isinstance(x, Tensor) else torch.full((), x, device=device)


def _positions(operands: Operands, site: Site) -> Positions:
    """Where the queries stand: the number of the first, None for bottom right, or a tensor of positions."""
    if site.frame is None:
        return 0
    first = simplify(site.frame.position - i)
    if first == simplify(k_len - q_len):
        return None
    value = operands.arrays(torch.float64).read(site.frame.position if first.mentions(i) else first)
    if not isinstance(value, Tensor):
        assert isinstance(value, int | torch.SymInt), "positions are integers"
        return value
    if value.ndim == 0:
        value = value + torch.arange(operands.q_len, device=value.device)
        return value[None, None]
    rows = value[..., 0]
    return rows[(None,) * (3 - rows.ndim)]
