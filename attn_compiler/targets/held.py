"""What queries see of the past, and whether a cache that let go of the rest serves them."""

from __future__ import annotations

from collections.abc import Iterator

from attn_compiler.algebra.expr import const, k_len, q_len
from attn_compiler.algebra.output import Local
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.kept import Kept
from attn_compiler.planning.site import Site
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.reach import reach


def seen(variant: Variant, heads: int) -> Kept | None:
    """What queries that follow each other see of the past, where the places of what is held are known; None for everything."""
    parts = list(of_heads(variant, heads))
    within = [None if _asks_for_all(part) else reach(part.mask) for part in parts]
    known = [x for x in within if x is not None]
    first, behind = max((x.prefix for x in known), default=0), max(map(neighbors, parts))
    apart = first and behind  # first tokens stand in front of the latest, so neighbors cannot be counted from the last one
    return None if len(known) < len(within) or apart else Kept(first, max(behind, *(x.farthest for x in known)))


def neighbors(part: Variant) -> int:
    """How many tokens before a query have values that are added to its result, whether it attends to them or not."""
    return max((step.behind for step in part.output if isinstance(step, Local)), default=0)


def lost(site: Site, variant: Variant) -> str:
    """Why a variant misses keys that the cache of a site let go of; nothing if it does not."""
    if site.kept is None:
        return ""
    first = site.frame.first_key if site.frame else None  # rows that are padded hold their own first tokens
    needed = seen(variant.map(lambda node: node.substitute({first: const(0)})) if first is not None else variant, site.heads)
    said = f"this model's cache holds {site.kept}, and this needs {needed or 'every token'}: make both with one policy"
    return "" if site.kept.covers(needed) else said


def of_heads(variant: Variant, heads: int) -> Iterator[Variant]:
    """The variants that the heads compute, with the branches of each."""
    return (part for _, of_group in head_groups(variant, heads) for part in of_group.parts())


def _asks_for_all(part: Variant) -> bool:
    """Whether it follows from how many tokens there are, or from those that no query sees."""
    return part.delta is not None or bool(part.derived or part.context) or asks_how_many(part)


def asks_how_many(variant: Variant) -> bool:
    """Whether it follows from how many queries or keys there are, which a part of them cannot tell."""
    return any(node.mentions(k_len, q_len) for node in variant.expressions())
