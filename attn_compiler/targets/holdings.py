"""What generating costs in memory: how much of its past each attention of a plan needs, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.cost import bits_of
from attn_compiler.planning.kept import Caches, Holding, Kept
from attn_compiler.planning.plan import Decision, Plan
from attn_compiler.planning.site import Kind, Phase, Site
from attn_compiler.targets.held import of_heads, seen
from attn_compiler.targets.held_past import latest, remembered_parts
from attn_compiler.targets.linear import linear
from attn_compiler.targets.operands import kv_owners
from attn_compiler.targets.reach import sides
from attn_compiler.targets.rows import row_dtype, row_width
from attn_compiler.targets.traits import Trait, traits

FEWEST = 32  # bits of a number in a state, whatever keys come in


def with_caches(plan: Plan) -> Plan:
    """The same plan, where each attention that generates says what a cache has to hold for it."""
    return replace(plan, decisions=tuple(replace(d, caches=_caches(d)) for d in plan.decisions))


def _caches(decision: Decision) -> Caches | None:
    site = decision.site
    if site.kind is not Kind.SELF or site.phase is Phase.TRAIN or site.recalls or site.frame is None:
        return None
    own, decided = (_from_first_key(variant, site) for variant in (site.computes, decision.variant))
    if site.phase is Phase.PREFILL and not _follows(own, site.heads):
        return None
    return Caches(_holding(own, site), _holding(decided, site))


def _from_first_key(variant: Variant, site: Site) -> Variant:
    """The variant of a row without padding: how much is held does not depend on where a row begins."""
    first = site.frame.first_key if site.frame else None
    return variant.map(lambda node: node.substitute({first: e.const(0)})) if first is not None else variant


def _holding(variant: Variant, site: Site) -> Holding:
    kept, token = _needed(variant, site.heads), _token(variant, site)
    parts = remembered_parts(variant, site.heads)
    if kept is not None or not parts:
        return Holding(token, kept)
    near = latest(variant, site.heads)
    beside = sum(_trait(one, site) for one in traits(variant))
    return Holding(token + beside, Kept(0, near) if near else None, sum(_state(members, leaf, site) for members, leaf in parts))


def _trait(one: Trait, site: Site) -> int:
    """Bytes of what is held of a token beside its key and value."""
    count, bits = one.heads(site.heads), bits_of(site.dtype)
    return (
        count * (site.head_dim if one.wide else 1) * max(FEWEST, bits) if count else site.kv_heads * site.head_dim * bits
    ) // 8


def _state(members: Sequence[int], leaf: Variant, site: Site) -> int:
    """Bytes of the state of a linear part of some heads: those of one kv head share it unless theirs differ."""
    found = linear(leaf)
    fades = leaf.delta is not None or (found is not None and found.fades is not None)
    by_head = any(block.weights is not None and block.weights.mentions(e.h) for block in leaf.feature.of_k)
    shared = kv_owners(members, site.heads // site.kv_heads)
    own = len(members) if fades or by_head else len(shared)
    return own * (leaf.feature.width(site.head_dim) + 1) * (site.value_dim + 1) * max(FEWEST, bits_of(site.dtype)) // 8


def _token(variant: Variant, site: Site) -> int:
    """Bytes of the keys and values of one token, as the storage of the heads holds them."""
    held = {part.storage.kv_cache for part in of_heads(variant, site.heads)}
    how = held.pop() if len(held) == 1 else None
    if how is None:
        return site.kv_heads * (site.head_dim + site.value_dim) * bits_of(site.dtype) // 8
    return site.kv_heads * sum(int(row_width(dim, how)) for dim in (site.head_dim, site.value_dim)) * row_dtype(how).itemsize


@lru_cache(maxsize=256)
def _needed(variant: Variant, heads: int) -> Kept | None:
    return seen(variant, heads)


@lru_cache(maxsize=256)
def _follows(variant: Variant, heads: int) -> bool:
    """Whether no query sees a key ahead of it, so that tokens can be made one after the other."""
    nearest = (sides(part.mask).nearest for part in of_heads(variant, heads))
    return all(n >= 0 and math.isfinite(n) for n in nearest)
