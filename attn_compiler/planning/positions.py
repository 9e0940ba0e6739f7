"""What speaks of positions, laid over a site: where these count from, and where a site does not know them."""

from __future__ import annotations

from dataclasses import replace

from attn_compiler.algebra.expr import Expr, Sort, const, every, i, k, q, q_len, rebuild
from attn_compiler.algebra.simplify import conjuncts, simplify
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.site import Frame, Site
from attn_compiler.planning.words import Seen, with_phantoms

UNPLACED = "speaks of distances, and nobody knows where this site's queries stand among its keys"
UNPADDED = (
    "counts positions from a row's first valid key, and the site's own mask is a run-time table, in which padding cannot be told "
    "from the rest"
)
LOST = "speaks of positions, and this site's cache slides: its oldest keys are gone, so that only distances are known"


def masked(seen: Seen, variant: Variant, site: Site, replace_mask: bool) -> Variant | Refusal:
    """The variant whose mask a rule sets, or joins with its own."""
    if site.frame is None and any(part.mentions(q) for part in (seen.keep, seen.phantoms, seen.times)):
        return Refusal("rule", f"its mask {UNPLACED}")
    if is_lost(site, seen.keep, seen.phantoms, seen.times):
        return Refusal("rule", f"its mask {LOST}")
    if replace_mask and site.frame and site.frame.slides:
        return Refusal("rule", "`replace_mask` may show any key, and this site's cache slides: its oldest keys are gone")
    if _counts_from_start(seen) and not padding_is_known(variant.mask, site):
        return Refusal("rule", f"its mask {UNPADDED}")
    kept: Expr | Refusal = variant.mask
    if replace_mask:
        kept = _padding(variant.mask, site.frame or Frame())
    if isinstance(kept, Refusal):
        return kept
    keep, phantoms, times = (placed(part, site) for part in (seen.keep, seen.phantoms, seen.times))
    return with_phantoms(replace(variant, mask=simplify(kept & keep)), replace(seen, keep=keep, phantoms=phantoms, times=times))


def _counts_from_start(seen: Seen) -> bool:
    """Whether a mask means something else when all tokens move by one place, but for its tables."""
    return any(counts(without_tables(part)) for part in (seen.keep, seen.phantoms, seen.times))


def is_lost(site: Site, *parts: Expr) -> bool:
    """Whether something is read at a position, where only distances are known."""
    return bool(site.frame and site.frame.slides) and any(map(counts, parts))


def counts(part: Expr) -> bool:
    """Whether it means something else when all tokens move by one place."""
    return simplify(part.substitute({q: q + 1, k: k + 1})) != simplify(part)


def without_tables(e: Expr) -> Expr:
    """`e` where every table is read at one place: tables stay addressed by place, whatever positions are counted from."""
    return e.transform(lambda node: rebuild(node, tuple(const(0) for _ in node.args)) if node.op == "table" else node)


def padding_is_known(mask: Expr, site: Site) -> bool:
    """Whether no table of a site's mask could hide padding among other things."""
    if site.frame and site.frame.first_key is not None:
        return True
    return not any(
        node.op == "table" and node.sort is Sort.BOOL and len(node.args) > 2 and node.mentions(k) for node in mask.walk()
    )


def placed(e: Expr, site: Site) -> Expr:
    """Let positions count from the row's first valid key; tables stay addressed by place."""
    first = site.frame.first_key if site.frame else None
    if first is None:
        return e
    shifted = {q: q - first, k: k - first}
    done: dict[Expr, Expr] = {}
    for node in e.walk():
        args = tuple(done[a] for a in node.args)
        done[node] = shifted.get(node, node) if node.op in ("symbol", "const", "table") else rebuild(node, args)
    return done[e]


def _padding(mask: Expr, frame: Frame) -> Expr | Refusal:
    """The part of a site's mask that hides padding and unwritten cache slots, which a replaced mask keeps."""
    kept: list[Expr] = []
    for part in conjuncts(mask):
        if not part.mentions(q, i):
            kept.append(part)
        elif part.tables():
            return Refusal("rule", "the site's own mask is a run-time table, in which padding cannot be told from the rest")
    if frame.position != i:
        kept.append(k <= frame.position.substitute({i: q_len - 1}))
    return every(*kept)
