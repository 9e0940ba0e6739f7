"""Where a site's queries stand among its keys, and what kind of attention that makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import SymBool, fx

from attn_compiler import torch_private as private
from attn_compiler.algebra.expr import Expr, Sort, b, i, k, k_len, q, q_len, rebuild, table
from attn_compiler.algebra.linear import expression, linear
from attn_compiler.algebra.simplify import conjuncts, disjuncts, simplify
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import UnknownLengthError
from attn_compiler.graph.axes import rearranges, repeats, source
from attn_compiler.graph.calls import Call, Size, call, equal, is_tensor, shape, value
from attn_compiler.graph.mutation import Versions
from attn_compiler.graph.recalled import recalled
from attn_compiler.graph.record import GraphSite
from attn_compiler.graph.recover import Recovered
from attn_compiler.graph.streams import origin
from attn_compiler.graph.symbolic import SymbolicReader
from attn_compiler.graph.symbolic_creation import CREATION
from attn_compiler.planning.site import Frame, Kind, Phase

_MOST_DECODED = 16  # queries of one call that still count as decoding
_OF_THE_SAME_TOKENS = ("cast", "slice", "same", "decoded", "placed")


@dataclass(frozen=True)
class FirstKey:
    """The table that a frame counts positions from: the first key of each row for which `valid`, over `b k`, holds."""

    name: str
    valid: Expr


def frame(site: GraphSite, recovered: Recovered, reader: SymbolicReader) -> Frame | None:
    """The position of query `i`, and how it was found; None where nobody knows."""
    if recalled(site):
        return _from_cache(site, reader)
    mask = recovered.variant.mask
    for part in conjuncts(mask):
        for bound in disjuncts(part):
            position = _from_causal(bound, site)
            if position is not None:
                return Frame(position, "the causal mask")
    cached = _from_cache(site, reader)
    if cached is not None:
        return cached
    if equal(*site.lengths) and origin(site).in_order:
        return Frame(i, "queries and keys are the same tokens")
    return None


def first_key(site: GraphSite, mask: Expr) -> FirstKey | None:
    """The padding of a mask, as the table to count positions from. Whoever uses it supplies that table."""
    for part in conjuncts(mask):
        read = any(node.op == "table" and node.mentions(k) for node in part.walk())
        if read and part.symbols() <= {b, k} and not _is_row_of_mask(site, part):
            return FirstKey(f"first_key:{min(part.tables())}", part)
    return None


def _is_row_of_mask(site: GraphSite, part: Expr) -> bool:
    """Whether a table could be the only row of a whole mask, whose first visible key need not be the row's first valid one."""
    return equal(site.lengths[0], 1) and any(node.op == "table" and len(node.args) > 2 for node in part.walk())


def counted_from(found: Frame, padding: FirstKey) -> Frame:
    """The same frame, counting from each row's first valid key."""
    return replace(found, first_key=table(padding.name, b))


def restated(variant: Variant, found: Frame) -> Variant:
    """The same variant, speaking of positions where that leaves no index of a query: causal reads `k <= q`."""
    difference = linear(found.position) - linear(i)
    if i in difference.factors or found.position.tables():
        return variant.map(lambda e: simplify(e.substitute({found.position: q})) if e.sort is Sort.BOOL else e)
    shifted = expression(linear(q) - difference)

    def change(e: Expr) -> Expr:
        return _outside_tables(e, shifted) if e.mentions(i) else e

    return variant.map(change)


def _outside_tables(e: Expr, shifted: Expr) -> Expr:
    """Tables stay addressed by the query's index."""
    if e.op == "table":
        return e
    if e == i:
        return shifted
    changed = rebuild(e, tuple(_outside_tables(a, shifted) for a in e.args)) if e.args else e
    return simplify(changed) if changed.sort is not Sort.REAL else changed


def _from_causal(bound: Expr, site: GraphSite) -> Expr | None:
    """`k <= i + offset`, or `k <= position of i`. The far side of a window reaches beyond the last key."""
    if bound.op != "le" or any(x.sort is not Sort.INDEX for x in bound.args):
        return None
    difference = linear(bound.args[0]) - linear(bound.args[1])
    if difference.factors.get(k) != 1:
        return None
    rest = (difference + linear(k) * -1) * -1
    if rest.factors.get(i, 0) == 1 and not any(a.mentions(k, i) for a in rest.factors if a != i):
        among_keys = len(rest.factors) > 1 or rest.constant == 0 or (rest.constant > 0 and _stay(site, rest.constant))
        return expression(rest) if among_keys else None
    reads = [a for a in rest.factors if a.op == "table"]
    whole = len(rest.factors) == 1 and len(reads) == 1 and rest.constant == 0 and rest.factors[reads[0]] == 1
    return reads[0] if whole and reads[0].mentions(i) and not reads[0].mentions(k) else None


def _stay(site: GraphSite, moved: int) -> bool:
    """Whether all queries, moved by that much, are known to stand at places of keys."""
    queries, keys = site.lengths
    return private.statically_known_true(keys - queries >= moved)


def _from_cache(site: GraphSite, reader: SymbolicReader) -> Frame | None:
    """How the keys were put together."""
    node = site.k.node
    while True:
        read = call(node)
        if read.op == "cat" and len(read["tensors"]) == 2:
            new = read["tensors"][1]
            dim = read["dim"]
            if is_tensor(new) and equal(new.meta["val"].shape[dim], site.lengths[0]) and not equal(*site.lengths):
                return Frame(i + (k_len - q_len), "the cache that new keys are appended to")
            return None
        if read.op == "recall":
            position = i if equal(*site.lengths) else i + (k_len - q_len)
            return Frame(position, "the state that stands for the past", slides=True)
        if read.op in ("index_copy", "index_put"):
            return _written(node, site, reader)
        if _ends_in_queries(node, site, reader.versions):
            return Frame(i + (k_len - q_len), "the cache that new keys are written behind")
        if not (is_tensor(node) and (rearranges(node) or repeats(node) or read.op in _OF_THE_SAME_TOKENS)):
            return None
        node = source(node)


def _ends_in_queries(node: fx.Node, site: GraphSite, versions: Versions) -> bool:
    """Whether this is the front of a tensor, as far as it was last written to, which was as many tokens as there are queries."""
    front = call(node)
    if front.op != "slice" or front["start"] not in (0, None) or front["step"] != 1:
        return False
    for part in source(node).users:
        cut = call(part)
        writers = [user for user in part.users if call(user).op == "copy" and call(user)["self"] is part]
        if cut.op != "slice" or cut["dim"] != front["dim"] or cut["step"] != 1 or len(writers) != 1:
            continue
        ends = equal(_end(cut), _end(front)) and equal(_end(front), site.lengths[1])
        latest = versions.precedes(writers[0], node) and versions.holds(source(node), writers[0], site.out.node)
        if ends and latest and equal(shape(part)[cut["dim"]], site.lengths[0]):
            return True
    return False


def _end(cut: Call) -> Size:
    return value(cut["end"])  # type: ignore[no-any-return]


def _written(node: fx.Node, site: GraphSite, reader: SymbolicReader) -> Frame | None:
    read = call(node)
    places = read["index"] if read.op == "index_copy" else next((x for x in read["indices"][::-1] if x is not None), None)
    if not isinstance(places, fx.Node) or not is_tensor(places) or places.meta["val"].ndim != 1:
        return None
    if not _keeps_places(node, reader.versions):
        return None
    seen = reader.versions.read(places, node)
    if seen is None:
        return None
    position = reader.at(seen, (i,))
    return Frame(position, "the places of the cache that new keys are written to")


def _keeps_places(written: fx.Node, versions: Versions) -> bool:
    """Whether keys are written into a cache as it was given or made: in one that was rolled before, places are no positions."""
    node: fx.Node | None = written
    while node is not None and (call(node).op in ("index_copy", "index_put") or rearranges(node)):
        node = versions.read(source(node), node)
    return node is not None and (node.op != "call_function" or call(node).op in CREATION)


def kind(site: GraphSite) -> Kind | None:
    """Self, cross, joint or pool; None where queries and keys are inputs of the graph, so that only lengths can tell."""
    found = origin(site)
    if found.same:
        return Kind.JOINT if found.joined else Kind.SELF
    if not found.projected:
        return None
    return Kind.POOL if found.learned else Kind.CROSS


def phase(site: GraphSite, recorded: frozenset[fx.Node]) -> Phase:
    """Whether gradients are recorded, few queries meet more keys, or neither; dynamic lengths are taken for the likely ones."""
    if site.q.node in recorded:
        return Phase.TRAIN
    queries, keys = (private.likely(size, 2 * _MOST_DECODED) for size in site.lengths)
    meets_past = keys > queries or recalled(site) is not None
    return Phase.DECODE if queries <= _MOST_DECODED and meets_past else Phase.PREFILL


def decodes(site: GraphSite) -> bool:
    """Whether few queries meet more keys; where that depends on dynamic lengths, the answer becomes a guard."""
    queries, keys = site.lengths
    meets_past = recalled(site) is not None
    if private.statically_known_true(keys <= queries) and not meets_past:
        return False
    return answer(queries <= _MOST_DECODED) and (meets_past or answer(keys > queries))


def answer(question: bool | SymBool) -> bool:
    """What holds of lengths in this compilation: where they are dynamic, it becomes a guard."""
    known = private.guarded(question)
    if known is None:
        raise UnknownLengthError("the length here depends on data: it is only known when the model runs")
    return known
