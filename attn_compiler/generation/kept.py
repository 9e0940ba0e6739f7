"""What a layer of a cache has to hold so that later queries find every key that they see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attn_compiler.algebra.storage import Held
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.kept import FAR, Kept, together
from attn_compiler.planning.planner import agreed
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.site import Phase, Site
from attn_compiler.targets.held import of_heads, seen
from attn_compiler.targets.rows import alone


def kept_at(policy: Policy, site: Site) -> Kept | None:
    """What must be kept at a site, whatever its phase and length become; None for everything."""
    return together(_seen(variant, site.heads) for variant in _asked(policy, site))


def _seen(variant: Variant, heads: int) -> Kept | None:
    """What is seen of the past; everything, where a cache holds less than a variant reads of a token, which its plan refuses."""
    return None if any(part.made or part.unrotated for part in of_heads(variant, heads)) else seen(variant, heads)


def held_at(policy: Policy, site: Site) -> Held | None:
    """In how few bits keys and values are kept at a site; None for as they come."""
    found = {part.storage.kv_cache for variant in _asked(policy, site) for part in of_heads(variant, site.heads)}
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
        for tokens in (2, FAR):
            yield replace(site.likely(), phase=phase, k_hint=tokens, q_hint=1 if phase is Phase.DECODE else tokens)
