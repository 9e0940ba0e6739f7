"""What the cache of a file has to hold, which knows no places: keys stand there as if those in between had never been."""

from __future__ import annotations

from attn_compiler.algebra.bounds import Interval, Occupancy, occupancy
from attn_compiler.algebra.expr import Expr, Sort, const, every, k, k_len, q
from attn_compiler.algebra.simplify import conjuncts, simplify
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.kept import FAR, Kept
from attn_compiler.targets.held import of_heads, seen
from attn_compiler.targets.reach import beyond

MOST_PINNED = 256


def kept(variant: Variant, heads: int) -> Kept | None:
    """What queries that follow each other see of the past, where the keys in between may be left out; None for everything.

    Left out, they move the first keys nearer: nothing but the mask may tell, and the mask must say the same of them there.
    """
    found = seen(variant, heads)
    return found if found and all(_bears(part, found) for part in of_heads(variant, heads)) else None


def _bears(part: Variant, held: Kept) -> bool:
    mixed = () if part.mix is None else part.mix.weights
    scores = (part.scale, part.score, *part.normalizer.expressions(), *mixed)
    if held.first > MOST_PINNED or any(node.mentions(q, k) and held.first for node in scores):
        return False
    if any(node.mentions(k_len) for node in (part.mask, *scores)):
        return False
    mask = part.mask if held.first else _without_padding(part.mask)
    if not all(_only_tells_distances(node) for node in (beyond(mask, held.first), *scores)):
        return False
    far = {q: Interval(held.first + held.latest, FAR)}
    return all(occupancy(part.mask.substitute({k: const(n)}), far) is not Occupancy.MIXED for n in range(held.first))


def _without_padding(mask: Expr) -> Expr:
    """The mask without what tables along the keys say by themselves: these are cut as the cache is."""
    return every(*(part for part in conjuncts(mask) if not _is_padding(part)))


def _is_padding(part: Expr) -> bool:
    rest = part.transform(lambda node: node if node.op != "table" or node.args[-1:] != (k,) else const(0))
    return part.mentions(k) and not rest.mentions(k, q)


def _only_tells_distances(node: Expr) -> bool:
    moved = node.substitute({q: q + 1, k: k + 1})
    return not node.mentions(q, k) or _settled(moved) == _settled(node)


def _settled(node: Expr) -> Expr:
    return simplify(node) if node.sort is Sort.BOOL else node.transform(lambda x: simplify(x) if x.sort is Sort.INDEX else x)
