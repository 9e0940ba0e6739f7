"""What a rule lets become of keys before an attention, and of results behind it; and why something has no place at a site."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from attn_compiler.algebra.context import Context, Merge
from attn_compiler.algebra.expr import k, k_len, q, true
from attn_compiler.algebra.output import Local, Step
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.positions import LOST, UNPADDED, UNPLACED
from attn_compiler.planning.site import Kind, Site


def with_results(variant: Variant, steps: tuple[Step, ...], site: Site) -> Variant | Refusal:
    """The variant that takes these steps with its result; neighbors are found by where a query stands."""
    convolutions = [step for step in steps if isinstance(step, Local)]
    if convolutions and site.frame is None:
        return Refusal("rule", f"its `local_conv` {UNPLACED}")
    if site.frame and any(step.grid for step in convolutions) and (site.frame.slides or site.frame.first_key is not None):
        return Refusal("rule", f"its `local_conv` {LOST if site.frame.slides else UNPADDED}")
    return replace(variant, output=steps)


def in_context(variant: Variant, context: tuple[Context | Merge, ...], site: Site) -> Variant | Refusal:
    """Pooled keys stand nowhere, so nothing may ask where they stand; keys in front of all others are nobody's neighbors."""
    brought = [one.how == "extra" for one in context]
    if any(brought) and (
        variant.delta is not None or variant.gates is not None or variant.storage.kv_cache or variant.order is not None
    ):
        return Refusal("rule", "keys of its own are no tokens, so no state, no cache and no order of tokens may speak of them")
    if any(earlier and not later for earlier, later in pairwise(brought)):
        return Refusal("rule", "what its context adds with `extra` comes last, or it would be pooled with the tokens")
    if all(brought):
        return replace(variant, context=context)
    asks = variant.order is not None or any(x.mentions(q, k, k_len) for x in (variant.scale, variant.score))
    said = "its context makes other keys of all that there are, and a mask, a score or an order asks where keys stand"
    if asks or variant.mask != true:
        return Refusal("rule", said)
    merging = [one for one in context if isinstance(one, Merge)]
    counted = merging or any(one.name or one.second for one in context if isinstance(one, Context) and one.how == "agents")
    if counted and sum(one.how != "extra" for one in context) > 1:
        said = "merged tokens lie on no grid, and biases count all tokens"
        return Refusal("rule", f"{said}, so such a word stands with no other one but `extra`")
    placed = _on_grid(merging[0], site) if merging else None
    if isinstance(placed, Refusal):
        return placed
    return replace(variant, context=tuple(placed if placed and isinstance(one, Merge) else one for one in context))


def merges(variant: Variant) -> bool:
    """Whether a variant without groups and branches merges tokens."""
    return any(isinstance(one, Merge) for one in variant.context)


def _on_grid(one: Merge, site: Site) -> Merge | Refusal:
    """The merge on its grid, which the length of a square says; or why nothing can be merged so."""
    tokens = site.k_len
    if site.q_len != tokens or site.kind is not Kind.SELF:
        return Refusal("rule", "tokens that are merged are queries and keys alike, and here these are not the same tokens")
    if not isinstance(tokens, int):
        return Refusal("rule", "how many tokens are merged follows from their number, which changes from call to call here")
    side = math.isqrt(tokens)
    one = one if one.grid else replace(one, grid=(side, side))
    if math.prod(one.grid) != tokens:
        return Refusal("rule", f"its tokens lie on a square, and there are {tokens}")
    if one.left(one.share) == tokens:
        return Refusal("rule", f"nothing is merged: cells of {one.cell[0]} by {one.cell[1]} leave no token to merge")
    agents, left = one.left(one.agents or one.share), one.left(one.share)
    if one.agents and agents * 2 >= left:
        said = f"{agents} agents are no fewer than half of the {left} tokens that are left: merge alone costs less"
        return Refusal("rule", f"{said}, so leave `agents`, `power` and `shortcut` away")
    return one
