"""What a rule lets become of keys before an attention, and of results behind it; and why something has no place at a site."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from attn_compiler.algebra.context import Context
from attn_compiler.algebra.expr import k, k_len, q, true
from attn_compiler.algebra.output import Local, Step
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.positions import LOST, UNPADDED, UNPLACED
from attn_compiler.planning.site import Site


def with_results(variant: Variant, steps: tuple[Step, ...], site: Site) -> Variant | Refusal:
    """The variant that takes these steps with its result; neighbors are found by where a query stands."""
    convolutions = [step for step in steps if isinstance(step, Local)]
    if convolutions and site.frame is None:
        return Refusal("rule", f"its `local_conv` {UNPLACED}")
    if site.frame and any(step.grid for step in convolutions) and (site.frame.slides or site.frame.first_key is not None):
        return Refusal("rule", f"its `local_conv` {LOST if site.frame.slides else UNPADDED}")
    return replace(variant, output=steps)


def in_context(variant: Variant, context: tuple[Context, ...]) -> Variant | Refusal:
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
    return Refusal("rule", said) if asks or variant.mask != true else replace(variant, context=context)
