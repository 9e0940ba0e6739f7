"""Finds what q, k and v of a site were made of: the input of their block, and q and k before a rotary embedding."""

from __future__ import annotations

from torch import fx

from attn_compiler.graph.atom import Axis
from attn_compiler.graph.axes import rearranges, source
from attn_compiler.graph.calls import Argument, Size, call, equal, is_tensor, shape
from attn_compiler.graph.mutation import Versions
from attn_compiler.graph.record import GraphSite, Operand
from attn_compiler.graph.tokens import before

_MOST_VISITED = 100  # nodes of one walk; a projection's input is never far


def block_input(site: GraphSite, versions: Versions) -> fx.Node | None:
    """The [batch, tokens, channels] that q, k and v are projections of, token by token; None where nobody knows."""
    found = {_projected_from(operand, site) for operand in (site.q, site.k, site.v)}
    node = found.pop()
    if found or node is None or len(shape(node)) != 3:
        return None
    rows, tokens, _ = shape(node)
    sizes = _size(site.q, site.batch), site.lengths[0]
    read = next((user for user in node.users if not call(user).writes), node)
    return node if equal(rows, sizes[0]) and equal(tokens, sizes[1]) and versions.holds(node, read, site.out.node) else None


def before_norm(block: fx.Node, site: GraphSite, versions: Versions) -> fx.Node | None:
    """What the input of a block is a norm of, each token by itself; None where it is no norm that torch has a name for."""
    read = call(block)
    while read.op in ("cast", "same"):
        block = read["self"]
        read = call(block)
    if read.op not in ("layer_norm", "rms_norm") or len(read["normalized_shape"]) != 1:
        return None
    given: fx.Node = read["input"]
    return given if versions.holds(given, block, site.out.node) else None


def _in_rows(node: fx.Node) -> fx.Node:
    """What lies flat for a projection, in rows of tokens; not where rows and tokens might be mistaken for each other."""
    if len(shape(node)) != 2 or call(node).op != "view" or len(shape(source(node))) != 3:
        return node
    rows, tokens, _ = shape(source(node))
    return node if equal(rows, tokens) and not equal(tokens, 1) else source(node)


def _size(operand: Operand, axis: Axis) -> Size:
    return next((n for n, own in zip(shape(operand.node), operand.axes, strict=True) if own == axis), 1)


def _projected_from(operand: Operand, site: GraphSite) -> fx.Node | None:
    """What all that an operand is made of is projected from, no token cut, moved or joined with others."""
    tokens = site.queries if operand is site.q else site.keys
    alone = equal(site.lengths[0], 1)  # a single token, which no dimension needs to hold
    dims = frozenset(dim for dim, axis in enumerate(operand.axes) if axis and axis == tokens)
    waiting, origins, visited = {operand.node: dims}, set[fx.Node](), 0
    while waiting and visited < _MOST_VISITED:
        visited += 1
        node = max(waiting)
        at = waiting.pop(node)
        steps = before(node, at)
        if steps is None or len(at) > 1 or not (at or alone):
            return None
        for step in steps:
            if step.cut:
                return None
            if step.projected and len(shape(step.node)) == 3 and step.dims != {1} and not alone:
                return None
            if step.projected:
                origins.add(_in_rows(step.node))
            else:
                waiting[step.node] = step.dims
    return origins.pop() if len(origins) == 1 and not waiting else None


def unrotated(site: GraphSite) -> tuple[Operand, Operand] | None:
    """q and k before x · cos + rotated(x) · sin; None where that is not how they were made."""
    q, k = _before_rotation(site.q), _before_rotation(site.k)
    return None if q is None or k is None else (q, k)


def _before_rotation(operand: Operand) -> Operand | None:
    node, axes = operand.node, operand.axes
    read = call(node)
    while read.op in ("recall", "cast", "same", "unsqueeze") or (read.op == "slice" and rearranges(node)):
        if read.op == "unsqueeze":
            at = read["dim"] % len(axes)
            axes = axes[:at] + axes[at + 1 :]
        node = read["new" if read.op == "recall" else "self"]
        read = call(node)
    if read.op != "add":
        return None
    terms = [_factors(term) for term in (read["self"], read["other"])]
    for plain, turned in (terms, terms[::-1]):
        for x in plain:
            if len(shape(x)) == len(axes) and any(_is_rotated(other, x) for other in turned):
                return Operand(x, axes)
    return None


def _factors(node: Argument) -> tuple[fx.Node, ...]:
    """The factors of a term."""
    if not is_tensor(node) or call(node).op != "mul":
        return ()
    read = call(node)
    return tuple(x for x in (read["self"], read["other"]) if is_tensor(x))


def _is_rotated(node: fx.Node, x: fx.Node) -> bool:
    """Whether `node` is the second half of x, negated, in front of the first."""
    read = call(node)
    if read.op != "cat" or len(read["tensors"]) != 2 or read["dim"] % len(shape(node)) != len(shape(node)) - 1:
        return False
    second, first = read["tensors"]
    if not is_tensor(second) or call(second).op != "neg":
        return False
    half = shape(x)[-1]
    parts = [call(part) for part in (first, call(second)["self"])]
    return isinstance(half, int) and all(
        part.op == "slice" and part["self"] is x and part["dim"] % len(shape(x)) == len(shape(x)) - 1 and part.get("step", 1) == 1
        and (part.get("start") or 0) == begins and min(part.get("end") or half, half) == ends
        for part, begins, ends in zip(parts, (0, half // 2), (half // 2, half), strict=True)
    )  # fmt: skip
