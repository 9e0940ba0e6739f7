"""What a cache has to hold so that later queries find every key that they see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from attn_compiler.algebra.bounds import Interval, Occupancy, occupancy
from attn_compiler.algebra.expr import Expr, Sort, const, k, k_len, q
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.storage import Held
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.planner import agreed
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.site import Phase, Site
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.reach import beyond, reach
from attn_compiler.targets.rows import alone

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
    return together(kept(variant, site.heads) for variant in _asked(policy, site))


def held_at(policy: Policy, site: Site) -> Held | None:
    """In how few bits keys and values are kept at a site; None for as they come."""
    found = {part.storage.kv_cache for variant in _asked(policy, site) for part in _of_heads(variant, site.heads)}
    if len(found) > 1:
        said = " and ".join(sorted(str(held or "as they come") for held in found))
        raise ShapeError(
            f"{site.name}: a cache holds all heads of a layer in one way, whatever the phase; the policy says {said}"
        )
    held = found.pop()
    reason = held and alone(held)
    if reason:
        raise ShapeError(f"{site.name}: no cache can grow that is held in {held}: {reason}; use a type with `per: token`")
    return held


def _asked(policy: Policy, site: Site) -> Iterator[Variant]:
    """What the policy makes of a site in each situation."""
    for then in situations(site):
        asked = agreed(policy, then).variant
        yield asked if isinstance(asked, Variant) and not site.blocked else site.computes


def situations(site: Site) -> Iterator[Site]:
    """A site as it reads a prompt and as it decodes, when few tokens are there and when many are."""
    for phase in (Phase.PREFILL, Phase.DECODE):
        for tokens in (2, _LAST):
            yield replace(site.likely(), phase=phase, k_hint=tokens, q_hint=1 if phase is Phase.DECODE else tokens)


def _of_heads(variant: Variant, heads: int) -> Iterator[Variant]:
    """The variants that the heads compute, with the branches of each."""
    return (part for _, of_group in head_groups(variant, heads) for part in of_group.parts())


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
    parts = list(_of_heads(variant, heads))
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
