"""What a cache has to hold so that later queries find every key that they see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from attn_compiler.algebra.bounds import Interval, Occupancy, occupancy
from attn_compiler.algebra.expr import Expr, Sort, const, k, k_len, q
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.resolve import asked_of
from attn_compiler.planning.site import Phase, Site
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.reach import beyond, reach

MOST_PINNED = 256
_LAST = 1 << 28  # a token that no text reaches


@dataclass(frozen=True)
class Kept:
    """The first tokens of each row, and the latest ones before a query."""

    first: int
    latest: int

    @property
    def most(self) -> int:
        """How many there are at most."""
        return self.first + self.latest

    def __str__(self) -> str:
        return f"the latest {self.latest} tokens" + (f" and the first {self.first}" if self.first else "")


def kept_at(policy: Policy, site: Site) -> Kept | None:
    """What must be kept at a site, whatever its phase and length become; None for everything."""
    needs: list[Kept | None] = []
    for then in situations(site):
        asked = asked_of(policy, then).variant
        needs.append(kept(asked if isinstance(asked, Variant) else site.computes, site.heads))
    return together(needs)


def situations(site: Site) -> Iterator[Site]:
    """A site as it reads a prompt and as it decodes, when few tokens are there and when many are."""
    for phase in (Phase.PREFILL, Phase.DECODE):
        for tokens in (2, _LAST):
            yield replace(site.likely(), phase=phase, k_hint=tokens, q_hint=1 if phase is Phase.DECODE else tokens)


def together(needs: Iterable[Kept | None]) -> Kept | None:
    """What serves all of them."""
    found = list(needs)
    if not found or None in found:
        return None
    return Kept(max(x.first for x in found if x), max(x.latest for x in found if x))


def kept(variant: Variant, heads: int) -> Kept | None:
    """What queries that follow each other see of the past, where the keys in between may be left out; None for everything.

    Left out, they move the first keys nearer: nothing but the mask may tell, and the mask must say the same of them there.
    """
    parts = [part for _, of_group in head_groups(variant, heads) for part in of_group.parts()]
    within = [reach(part.mask) for part in parts]
    known = [x for x in within if x is not None]
    if len(known) < len(within):
        return None
    found = Kept(max(x.prefix for x in known), max(0, *(x.farthest for x in known)))
    return found if all(_bears(part, found) for part in parts) else None


def _bears(part: Variant, held: Kept) -> bool:
    mixed = () if part.mix is None else part.mix.weights
    scores = (part.scale, part.score, part.normalizer.weight, part.normalizer.output, *mixed)
    if held.first > MOST_PINNED or any(node.mentions(q, k) and held.first for node in scores):
        return False
    if any(node.mentions(k_len) for node in (part.mask, *scores)):
        return False
    if not all(_only_tells_distances(node) for node in (beyond(part.mask, held.first), *scores)):
        return False
    far = {q: Interval(held.first + held.latest, _LAST)}
    return all(occupancy(part.mask.substitute({k: const(n)}), far) is not Occupancy.MIXED for n in range(held.first))


def _only_tells_distances(node: Expr) -> bool:
    moved = node.substitute({q: q + 1, k: k + 1})
    return not node.mentions(q, k) or _settled(moved) == _settled(node)


def _settled(node: Expr) -> Expr:
    return simplify(node) if node.sort is Sort.BOOL else node.transform(lambda x: simplify(x) if x.sort is Sort.INDEX else x)
