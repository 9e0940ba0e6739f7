"""Finds every attention of a captured graph by its data flow, and says of all that only looks like one what disagreed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from attn_compiler.graph.already import REASON, Already, already_linear
from attn_compiler.graph.axes import source
from attn_compiler.graph.bind import Anchor, Binding, DisagreementError, computing_dtype
from attn_compiler.graph.calls import call, dtype, is_tensor, shape
from attn_compiler.graph.chain import Path, Walk
from attn_compiler.graph.fused import bind_flex, bind_sdpa
from attn_compiler.graph.mutation import Versions
from attn_compiler.graph.names import module_path
from attn_compiler.graph.record import GraphSite
from attn_compiler.planning.plan import NearMiss

_MOST_TRIED = 6
_FUSED = {"scaled_dot_product_attention": bind_sdpa, "flex_attention": bind_flex}


@dataclass(frozen=True)
class Matches:
    """The attentions of a graph in order, and what looked like one and is left alone."""

    sites: tuple[GraphSite, ...]
    near_misses: tuple[NearMiss, ...]


def match(gm: fx.GraphModule) -> Matches:
    """Find the sites of a captured graph. Nothing is changed."""
    versions = Versions(gm.graph)
    sites: list[GraphSite] = []
    misses: dict[fx.Node, NearMiss] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            sites.extend(_sites(node, versions))
        except DisagreementError as reason:
            misses[node] = NearMiss(module_path(node), call(node).op, str(reason))
    for found in _already_linear(gm.graph, sites):
        for part in found.maps:
            misses.pop(part, None)
        misses[found.node] = NearMiss(module_path(found.node), "linear attention", REASON)
    return Matches(tuple(sites), tuple(misses.values()))


def _already_linear(graph: fx.Graph, sites: Sequence[GraphSite]) -> Iterator[Already]:
    """Linear attentions, none of whose softmaxes is that of another one: an attention to what attended is none."""
    anchors = {site.anchor for site in sites}
    for node in graph.nodes:
        found = already_linear(node) if node.op == "call_function" else None
        if found is not None and not anchors & set(found.maps):
            yield found


def _sites(node: fx.Node, versions: Versions) -> Iterator[GraphSite]:
    op = call(node).op
    if op in _FUSED:
        yield _FUSED[op](node, versions)
        return
    anchor = anchor_of(node, versions)
    if anchor is not None:
        yield _bound(anchor, versions)


def anchor_of(node: fx.Node, versions: Versions) -> Anchor | None:
    """The softmax that `node` is, or is the exponential of."""
    op = call(node).op
    return _softmax(node) if op == "softmax" else _written_out(node, versions) if op == "exp" else None


def _softmax(node: fx.Node) -> Anchor:
    read = call(node)
    return Anchor(node, read["self"], read["dim"], node, computing_dtype(node))


def _written_out(node: fx.Node, versions: Versions) -> Anchor | None:
    """`exp(log_softmax(s))`, `e / e.sum()`, or `(e @ v) / e.sum()` with `e = exp(s)`."""
    inside = versions.read(source(node), node)
    if inside is not None and call(inside).op == "log_softmax":
        return Anchor(inside, call(inside)["self"], call(inside)["dim"], node, computing_dtype(inside))
    sums = [
        user for user in node.users if call(user).op == "sum" and call(user)["keepdim"] and len(call(user).get("dim") or ()) == 1
    ]
    if len(sums) != 1:
        return None
    (mass,), (dim,) = sums, call(sums[0])["dim"]
    early = [user for user in mass.users if call(user).op == "div" and call(user)["self"] is node]
    last = dim % len(shape(node)) == len(shape(node)) - 1
    if early:
        return Anchor(node, source(node), dim, early[0], dtype(node))
    return Anchor(node, source(node), dim, node, dtype(node), mass) if last else None


def _bound(anchor: Anchor, versions: Versions) -> GraphSite:
    """Try the cheapest ways to the two products until one is an attention."""
    rank = len(shape(anchor.score))
    anchor = replace(anchor, dim=anchor.dim % rank - rank)
    walk = Walk(versions, anchor.dim)
    before = sorted(walk.backwards(anchor.score, anchor.node), key=lambda path: (path.cost, len(path.links)))
    if not before:
        raise DisagreementError(*(walk.blocked or (anchor.node, "no product of two tensors leads to the softmax")))
    behind = list(walk.forwards(anchor.weights))
    if not behind:
        raise DisagreementError(anchor.weights, "the weights enter no product")
    first: DisagreementError | None = None
    for start in before[:_MOST_TRIED]:
        for end in behind:
            try:
                site = Binding(anchor, start, end, versions).site()
            except DisagreementError as reason:
                first = first or reason
            else:
                return replace(site, escapes=_escapes(anchor, start, end))
    assert first is not None
    raise first


def _escapes(anchor: Anchor, before: Path, behind: Path) -> tuple[fx.Node, ...]:
    """Those who read scores or weights without contributing to the output."""
    passed = (before.product.node, *before.nodes(), anchor.node, anchor.weights, *behind.nodes())
    contributors = _contributors(behind.product.node, before.product.node)
    inside = contributors | set(passed) | {anchor.mass}
    readers = (user for node in _between(passed, contributors - {behind.product.node}) for user in node.users)
    return tuple(dict.fromkeys(user for user in readers if user not in inside and (is_tensor(user) or user.op == "output")))


def _between(passed: Iterable[fx.Node], contributors: set[fx.Node]) -> list[fx.Node]:
    """All nodes on the way, those included that do nothing (a dropout that is off) and so are not part of any path."""
    found = dict.fromkeys(passed)
    waiting = list(found)
    while waiting:
        new = [user for user in waiting.pop().users if user in contributors and user not in found]
        found.update(dict.fromkeys(new))
        waiting += new
    return list(found)


def _contributors(node: fx.Node, since: fx.Node) -> set[fx.Node]:
    """What `node` is made of, as far as it comes after `since` in the graph."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found and not current < since:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found
