"""The target of a call that names none: what a plan would choose for a site like it."""

from __future__ import annotations

from functools import lru_cache

import torch

from attn_compiler.algebra.expr import i
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import settled
from attn_compiler.planning.site import UNKNOWN_LENGTH, Frame, Kind, Phase, Site
from attn_compiler.runtime.targets import TARGETS, Attends, Target
from attn_compiler.targets.choice import FUSED_WHOLE, form_of
from attn_compiler.targets.operands import Operands
from attn_compiler.torch_private import likely


def automatic(operands: Operands, variant: Variant, *, lse: bool = False) -> Attends:
    """The first target that has nothing against the call and pays there; exported, or behind a state, PyTorch's own operators."""
    plain = TARGETS["torch"]
    if operands.past or torch.compiler.is_exporting():
        return plain
    shapes = tuple(tuple(int(likely(size, UNKNOWN_LENGTH)) for size in x.shape) for x in (operands.q, operands.k, operands.v))
    first = operands.first_query if operands.counts_from_zero() else None
    first = None if first is None else int(likely(first, 0))
    site = _site(variant, shapes, str(operands.q.dtype), operands.q.device.type, first, operands.differentiated)
    return next((target for target in _worthwhile(site) if not target.refuse(operands, variant, lse=lse)), plain)


@lru_cache(maxsize=1024)
def _site(
    variant: Variant, shapes: tuple[tuple[int, ...], ...], dtype: str, device: str, first: int | None, differentiated: bool
) -> Site:
    (batch, heads, q_len, dim), (_, kv_heads, k_len, _), (*_, value_dim) = shapes
    phase = Phase.TRAIN if differentiated else Phase.PREFILL
    frame = None if first is None else Frame(i + first)
    return Site(
        "attend", Kind.SELF, phase, None, None, batch, heads, kv_heads, q_len, k_len, dim, value_dim,
        dtype.removeprefix("torch."), variant, frame, q_len, k_len, device,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _worthwhile(site: Site) -> tuple[Target, ...]:
    """The targets to ask. What PyTorch has one operator for may be as fast there; anything else it does in steps."""
    variant = settled(site.computes, site)
    asked = tuple(TARGETS.values())
    if form_of(site, variant) not in FUSED_WHOLE:
        return asked
    return tuple(target for target in asked if not isinstance(target.carry(site, variant), Refusal))
