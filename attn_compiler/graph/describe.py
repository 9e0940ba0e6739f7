"""A matched attention as a planning site: what it computes, over positions, and all that a rule may ask about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import SymInt, fx

from attn_compiler.algebra.expr import i, k_len, q, q_len
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.storage import Held
from attn_compiler.algebra.variant import Variant
from attn_compiler.graph.atom import product
from attn_compiler.graph.calls import Size, call, shape, value
from attn_compiler.graph.frame import FirstKey, answer, counted_from, decodes, first_key, frame, kind, phase, restated
from attn_compiler.graph.inputs import before_norm, block_input, unrotated
from attn_compiler.graph.names import layer_numbers, place, title
from attn_compiler.graph.placed import placed
from attn_compiler.graph.recalled import recalled
from attn_compiler.graph.record import GraphSite, Operand
from attn_compiler.graph.recover import Recovered, recover
from attn_compiler.graph.risky import risky_tables
from attn_compiler.graph.sliding import slides
from attn_compiler.graph.symbolic import SymbolicReader, Table
from attn_compiler.planning.kept import Kept
from attn_compiler.planning.plan import NearMiss, Refusal
from attn_compiler.planning.site import UNKNOWN_LENGTH, Form, Frame, Kind, Length, Site, TableShape
from attn_compiler.runtime.codes import held_of
from attn_compiler.torch_private import likely


@dataclass(frozen=True)
class Described:
    """A site, where it stands in the graph, and what its tables are."""

    found: GraphSite
    site: Site
    tables: Mapping[str, Table]
    first_key: FirstKey | None
    block: fx.Node | None = None  # the input that q, k and v are projections of
    residual: fx.Node | None = None  # what that is a norm of
    unrotated: tuple[Operand, Operand] | None = None  # q and k before a rotary embedding
    codes: tuple[fx.Node, fx.Node] | None = None  # what k and v are decoded from, and `site.computes` says how
    makers: tuple[fx.Node, ...] = ()  # the products with weights that q, k and v come from
    takers: tuple[fx.Node, ...] = ()  # and those that take the output


def describe(gm: fx.GraphModule, found: GraphSite, reader: SymbolicReader) -> Described | NearMiss:
    """What a matched attention computes and where it stands, or why it has no formula."""
    recovered = recover(gm, found, reader)
    if isinstance(recovered, Refusal):
        return NearMiss(found.name, found.anchor.name, recovered.reason)
    stands = frame(found, recovered, reader)
    if stands and slides(found):
        stands = replace(stands, slides=True)
    padding = first_key(found, recovered.variant.mask) if stands else None
    if stands and padding:
        stands = counted_from(stands, padding)
    variant = restated(recovered.variant, stands) if stands else recovered.variant
    if placed(found) or recalled(found):  # the keys that are there are fewer; behind the queries come no more
        variant = variant.map(lambda e: simplify(e.substitute({k_len: q - i + q_len})) if e.mentions(k_len) else e)
    codes, held = _codes(found) or (None, None)
    site = _site(found, recovered, reader, stands, replace(variant, storage=replace(variant.storage, kv_cache=held)))
    block, earlier = block_input(found, reader.versions), unrotated(found)
    width = 0 if block is None else _known(shape(block)[-1])
    residual = block and before_norm(block, found, reader.versions)
    site = replace(site, input_width=width, rotated=earlier is not None, normed=residual is not None)
    return Described(found, site, reader.tables, padding, block, residual, earlier, codes)


def _codes(found: GraphSite) -> tuple[tuple[fx.Node, fx.Node], Held] | None:
    """The rows of codes that a cache holds of keys and values, and how."""
    held = placed(found)
    k, v = (call(x) for x in ((held.k, held.v) if held else (found.k.node, found.v.node)))
    if k.op != "decoded" or v.op != "decoded" or k["how"] != v["how"]:
        return None
    return (k["rows"], v["rows"]), held_of(k["how"])


def _site(found: GraphSite, recovered: Recovered, reader: SymbolicReader, stands: Frame | None, variant: Variant) -> Site:
    heads, kv_heads, head_dim, value_dim = (
        _known(product(axis)) for axis in (found.heads, found.kv_heads, found.depth, found.width)
    )
    q_len, k_len = found.lengths
    known, held, past = kind(found), placed(found), recalled(found)
    dynamic = any(isinstance(size, SymInt) for size in found.lengths)
    return Site(
        name=found.name,
        kind=known or (Kind.SELF if _hint(q_len) == _hint(k_len) else Kind.CROSS),
        phase=phase(found, reader.recorded),
        layer=None,
        layers=None,
        batch=_length(product(found.batch)),
        heads=heads,
        kv_heads=kv_heads,
        q_len=_length(q_len),
        k_len=_length(k_len),
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=str(found.dtype).removeprefix("torch."),
        computes=variant,
        frame=stands,
        q_hint=_hint(q_len),
        k_hint=_hint(k_len),
        device=value(found.q.node).device.type,
        form=_form(found),
        blocked=_blocked(found),
        notes=recovered.notes,
        literal=recovered.literal and (restated(recovered.literal, stands) if stands else recovered.literal),
        recalls=0 if past is None else len(past.past),
        summed="" if past is None else past.summed,
        traits=() if past is None else tuple(past.traits),
        kept=held.kept if held else Kept(0, past.latest) if past else None,
        risky=risky_tables(found, recovered.tables, reader.recorded),
        tables={name: _shape(table) for name, table in recovered.tables.items()},
        idiom=found.idiom,
        where=found.where,
        longer=(lambda tokens: answer(k_len >= tokens)) if isinstance(k_len, SymInt) else None,
        decodes=(lambda: decodes(found)) if dynamic else None,
        alike=(lambda: answer(q_len == k_len)) if dynamic and known is None else None,
    )


def with_layers(described: Sequence[Described]) -> tuple[Described, ...]:
    """Number the layers of each stack of blocks and count them, so that a rule's layer -1 is the last one."""
    numbers = layer_numbers([place(one.found.out.node) for one in described])
    return tuple(
        replace(one, site=replace(one.site, layer=layer, layers=layers))
        for one, (layer, layers) in zip(described, numbers, strict=True)
    )


def _length(size: Size) -> Length:
    return size if isinstance(size, int) else str(size)


def _hint(size: Size) -> int:
    return int(likely(size, UNKNOWN_LENGTH))


def _known(size: Size) -> int:
    """A size that a model's configuration fixes."""
    return size if isinstance(size, int) else int(size)


def _form(found: GraphSite) -> Form:
    if found.idiom != "sdpa":
        return "written out"
    if found.causal:
        return "scaled_dot_product_attention(is_causal)"
    masked = any(step.operands() for step in found.steps)
    return "scaled_dot_product_attention with a mask" if masked else "scaled_dot_product_attention"


def _blocked(found: GraphSite) -> str:
    if found.escapes:
        readers = ", ".join(node.name for node in found.escapes)
        return f"its attention weights are also read by {readers}"
    return ""


def _shape(table: Table) -> TableShape:
    seen = value(table.node)
    shape = () if table.dim is not None or not hasattr(seen, "shape") else tuple(_length(size) for size in seen.shape)
    return TableShape(shape, table.sort, "" if table.dim is not None else title(table.node))
