"""Carries out a plan: each site's code gives way to what its decision says. The only place that changes a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import SymInt, Tensor, fx

from attn_compiler import torch_private as private
from attn_compiler.algebra.expr import Sort, i, k, k_len, q_len
from attn_compiler.algebra.made import Made, Taken
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.storage import Held
from attn_compiler.algebra.variant import DerivedTable, Variant, with_tables_given
from attn_compiler.graph.axes import rearranges
from attn_compiler.graph.calls import Argument, call, is_tensor, shape
from attn_compiler.graph.capture import drop_dead_code
from attn_compiler.graph.describe import Described
from attn_compiler.graph.frame import FirstKey
from attn_compiler.graph.layout import arranged, kv_groups, returned
from attn_compiler.graph.placed import Placed, placed
from attn_compiler.graph.recalled import Recalled, forget, recalled, recalls, trait_nodes
from attn_compiler.graph.record import GraphSite
from attn_compiler.graph.rounding import rounding
from attn_compiler.graph.symbolic import Table, sizes
from attn_compiler.planning.site import Phase, Site
from attn_compiler.runtime.call import derived_tables
from attn_compiler.runtime.targets import Target
from attn_compiler.targets.made import made_rows, with_made
from attn_compiler.targets.operands import Operands, Positions
from attn_compiler.targets.rows import Codes, without_cache
from attn_compiler.targets.traits import KEY, traits

_COPIED_BEFORE = "attn_copied_before"  # of a copy: who writes to what it was copied from
_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "seq_nr", "custom")


@dataclass(frozen=True)
class Replacement:
    """A site, what to compute in its place and by what, and nodes for the tables that the site does not know of itself."""

    described: Described
    variant: Variant
    target: Target
    given: Mapping[str, fx.Node] = field(default_factory=dict)


def rewrite(gm: fx.GraphModule, replacements: Sequence[Replacement], rounded: Mapping[fx.Node, Held]) -> None:
    """Replace sites in place, and products whose factors are held so; what nobody reads any more, masks above all, disappears."""
    remembered = [node for replacement in replacements for node in recalls(replacement.described.found)]
    for replacement in replacements:
        tell(gm.graph, replacement)
    for replacement in replacements:
        compute, inputs = computation(gm.graph, replacement)
        splice(gm.graph, replacement.described.found.out.node, _record(compute, inputs), inputs)
    for node, how in rounded.items():
        compute, inputs = rounding(node, how)
        splice(gm.graph, node, _record(compute, inputs), inputs)
    forget(gm.graph, remembered)  # of sites that keep their code, it says at every call that the keys are gone
    drop_dead_code(gm)
    gm.graph.lint()
    gm.recompile()


def computation(graph: fx.Graph, replacement: Replacement) -> tuple[Callable[..., Tensor], list[fx.Node]]:
    """What computes a site's output in place of its code, and the nodes whose values it is given."""
    tables, found = _tables(graph, replacement), replacement.described.found
    held = placed(found)
    past = recalled(found) or held
    k, v = (held.k, held.v) if held else (found.k.node, found.v.node)
    behind = (*(past.nodes if past else ()), *(_codes(replacement) or ()))
    asked = _asked(replacement)
    inputs = [found.q.node, k, v, *behind, *asked.values(), *tables.values()]
    inputs += _sizes(graph, found, inputs)
    return _computation(replacement, list(asked), list(tables), past), inputs


def _asked(replacement: Replacement) -> dict[str, fx.Node]:
    """What the new variant works on besides q, k and v."""
    described, parts = replacement.described, replacement.variant.parts()
    asked: dict[str, fx.Node] = {}
    if any(part.unrotated for part in parts) and described.unrotated:
        asked |= {name: one.node for name, one in zip(("q", "k"), described.unrotated, strict=True)}
    sources = {one.source if isinstance(one, Taken) else "x" for part in parts for one in part.made}
    block = {"x": described.block, "residual": described.residual}
    asked |= {name: node for name, node in block.items() if name in sources and node is not None}
    return asked


def tell(graph: fx.Graph, replacement: Replacement) -> None:
    """Compute what a cache asks of new tokens, where that is what the new variant asks of them."""
    described, variant = replacement.described, replacement.variant
    nodes = {str(call(node)["name"]): node for node in trait_nodes(described.found)}
    if tuple(nodes) != tuple(one.name for one in traits(variant)):
        return  # it says at every call that the model attends otherwise
    made = {one.name: one for part in variant.parts() for one in part.made if isinstance(one, Made)}
    tables = _tables(graph, replacement)
    for name, node in nodes.items():
        new = call(node)["new"]
        if name == KEY:
            assert described.unrotated is not None
            inputs, compute = [new, described.unrotated[1].node], _cast
        else:
            assert described.block is not None
            read = {table: tables[table] for e in made[name].expressions() for table in e.tables()}
            inputs, compute = [new, described.block, *read.values()], _rows(described.site, made[name], list(read))
        splice(graph, node, _record(compute, inputs), inputs)


def _cast(new: Tensor, before: Tensor) -> Tensor:
    return before.to(new.dtype)


def _rows(site: Site, one: Made, names: Sequence[str]) -> Callable[..., Tensor]:
    def compute(new: Tensor, block: Tensor, *tables: Tensor) -> Tensor:
        nothing = new.new_empty((new.shape[0], site.heads, 0, new.shape[3]))
        operands = Operands(
            nothing, new, new, dict(zip(names, tables, strict=True)), 0, 0, tuple(range(site.heads)), site.heads, site.kv_heads,
            site.layer or 0, site.layers or 1,
        )  # fmt: skip
        return made_rows(operands, one, block)

    return compute


def splice(graph: fx.Graph, out: fx.Node, fragment: fx.GraphModule, inputs: Sequence[Argument]) -> None:
    """Copy `fragment` into `graph` in front of `out`, and let its result stand for that node; several stand for its parts."""
    given = iter(inputs)
    copies: dict[fx.Node, Argument] = {}
    with graph.inserting_before(out):
        for node in fragment.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                result = fx.map_arg(node.args[0], copies.__getitem__)
            else:
                copy = graph.node_copy(node, copies.__getitem__)
                copy.meta.update({key: out.meta[key] for key in _PROVENANCE if key in out.meta})
                copies[node] = copy
    single = isinstance(result, fx.Node)
    for part, by in [(out, result)] if single else [(part, result[part.args[1]]) for part in out.users]:
        _let_views_copy(part)
        part.replace_all_uses_with(by)
        graph.erase_node(part)
    if not single:
        graph.erase_node(out)


def _let_views_copy(out: fx.Node) -> None:
    """A view takes for granted how its tensor lies in memory, which need not hold of what takes the tensor's place."""
    views = [out]
    for node in views:
        views += [user for user in node.users if rearranges(user)]
    for node in views:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _record(compute: Callable[..., Tensor], inputs: Sequence[Argument]) -> fx.GraphModule:
    """The graph that computes a site's output from its operands and tables."""
    values = [private.known_value(x) if isinstance(x, fx.Node) else x for x in inputs]
    return private.retrace(compute, values)


def _unrounded(operands: Operands, variant: Variant) -> AbstractContextManager[object]:
    """Keeps autocast from rounding to 16 bits what codes and their scales stand for."""
    held = any(any(part.storage.held()) for part in variant.parts())
    return torch.autocast(operands.q.device.type, enabled=False) if held else nullcontext()


def _tables(graph: fx.Graph, replacement: Replacement) -> dict[str, fx.Node]:
    """The nodes behind the tables that the new variant and the positions of the queries need."""
    described = replacement.described
    needed = set(replacement.variant.tables()) - {table.name for table in _derived(replacement.variant)}
    if described.site.frame:
        needed |= described.site.frame.position.tables()
    padding = described.first_key
    if padding and padding.name in needed:
        needed = needed - {padding.name} | padding.valid.tables()
    given, by = replacement.given, described.found.out.node
    return {name: given[name] if name in given else _as_read(graph, described.tables[name], by) for name in sorted(needed)}


def _as_read(graph: fx.Graph, table: Table, by: fx.Node) -> fx.Node:
    """What `by` reads of a table, which for it is a copy where somebody writes to the table before."""
    node, writer = table.node, table.until
    if writer is None or not writer < by:
        return node
    for user in node.users:
        if user.meta.get(_COPIED_BEFORE) is writer:
            return user
    with graph.inserting_before(writer):
        copy = graph.call_function(torch.ops.aten.clone.default, (node,))
    copy.meta.update(node.meta)
    copy.meta[_COPIED_BEFORE] = writer
    return copy


def _sizes(graph: fx.Graph, found: GraphSite, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes that have the symbols of a site's axes as sizes, where q, k and v only have multiples of them."""
    axes = (*found.q.axes, *found.k.axes, *found.v.axes, *found.out.axes)
    symbolic = [atom.size for axis in axes for atom in axis if isinstance(atom.size, SymInt)]
    needed = {str(symbol) for size in symbolic for symbol in private.formula(size).free_symbols}
    plain = {str(size) for node in inputs if is_tensor(node) for size in shape(node)}
    known = sizes(graph)
    return list(dict.fromkeys(known[name].node for name in sorted(needed - plain) if name in known))


def _derived(variant: Variant) -> tuple[DerivedTable, ...]:
    return tuple(table for part in variant.parts() for table in part.derived)


def _codes(replacement: Replacement) -> tuple[fx.Node, fx.Node] | None:
    """What a cache holds of keys and values, where that is what the new variant reads, number by number."""
    described = replacement.described
    found, held = described.found, described.site.computes.storage.kv_cache
    kept = held and all(part.storage.kv_cache == held for part in replacement.variant.parts())
    laid_out = all(len(group) == 1 for group in (found.depth, found.width))
    ends = found.k.axes[-1:] == (found.depth,) and found.v.axes[-1:] == (found.width,)
    return described.codes if kept and laid_out and ends else None


def _computation(
    replacement: Replacement, asked: Sequence[str], names: Sequence[str], past: Recalled | Placed | None
) -> Callable[..., Tensor]:
    described, variant = replacement.described, replacement.variant
    found, site = described.found, described.site
    wanted = (found.batch, found.heads, found.queries, found.depth)
    groups_k = kv_groups(found.k.axes, found.batch, found.kv_heads, found.keys, found.depth)
    groups_v = kv_groups(found.v.axes, found.batch, found.kv_heads, found.keys, found.width)
    dtype = found.out.node.meta["val"].dtype
    dims = {name: described.tables[name].dim for name in names if name in described.tables}
    held = site.computes.storage.kv_cache if _codes(replacement) else None
    variant = without_cache(variant) if held else variant

    def compute(q: Tensor, k: Tensor, v: Tensor, *values: Argument) -> Tensor:
        of_past, values = (values[: len(past.nodes)], values[len(past.nodes) :]) if past else ((), values)
        codes = None
        if held:
            axes = (found.k.axes, groups_k), (found.v.axes, groups_v)
            of_k, of_v = (Codes(arranged(x, *of), held, k.dtype) for x, of in zip(values[:2], axes, strict=True))
            codes, values = (of_k, of_v), values[2:]
        besides, values = dict(zip(asked, values, strict=False)), values[len(asked) :]
        earlier = None
        if "q" in besides and described.unrotated:
            axes_q, axes_k = (one.axes for one in described.unrotated)
            groups = kv_groups(axes_k, found.batch, found.kv_heads, found.keys, found.depth)
            earlier = arranged(besides["q"], axes_q, wanted), arranged(besides["k"], axes_k, groups)
        q = arranged(q, found.q.axes, wanted)
        k = arranged(k, found.k.axes, groups_k)
        v = arranged(v, found.v.axes, groups_v)
        wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)  # scores may be in more precision than v
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        tables = {name: _tensor(x, dims.get(name), q.device) for name, x in zip(names, values, strict=False)}
        tables |= derived_tables(variant, k.shape[2], q.device)
        operands = Operands(
            q, k, v, tables, 0, 0, tuple(range(site.heads)), site.heads, site.kv_heads, site.layer or 0, site.layers or 1,
            training=variant.dropout > 0, differentiated=site.phase is Phase.TRAIN, risky=site.risky, codes=codes,
            unrotated=earlier,
        )  # fmt: skip
        operands = with_made(operands, variant, besides)
        if described.first_key and described.first_key.name in variant.tables():
            count = past.count(operands, of_past) if past else operands.k_len
            first = _first_key(operands, described.first_key, count)
            operands = replace(operands, tables={**operands.tables, described.first_key.name: first})
        if past:
            standing, of_held = past.stand(operands, variant, of_past)
        else:
            standing, of_held = replace(operands, q_positions=_positions(operands, site)), variant
        with _unrounded(standing, of_held):
            out, _ = replacement.target.attend(standing, with_tables_given(of_held))
        return returned(out, (*wanted[:3], found.width), found.out.axes).to(dtype)

    return compute


def _tensor(x: Argument, dim: int | None, device: torch.device) -> Tensor:
    """A table as a tensor: also one that is a number in the graph (a symbolic size, a float that is an input)."""
    if dim is not None:
        x = x.shape[dim]
    return x if isinstance(x, Tensor) else torch.full((), x, device=device)


def _first_key(operands: Operands, padding: FirstKey, tokens: Argument) -> Tensor:
    """The first valid one of so many keys of each row, also where a cache let go of it."""
    arrays = operands.arrays(torch.float64)
    whole = {k: torch.arange(tokens, device=operands.q.device)}
    valid = arrays.tensor(arrays.read(padding.valid, whole), Sort.BOOL)
    rows = valid.expand(operands.q.shape[0], 1, 1, tokens)[:, 0, 0]
    return rows.to(torch.int64).argmax(dim=-1)


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
