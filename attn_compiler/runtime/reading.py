"""Reads the variant of a call: a mask text or a mapping of slots means what it means in a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from attn_compiler.algebra.expr import Expr, const
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import LanguageError
from attn_compiler.library import words
from attn_compiler.planning.language import parse_expression, parse_mask
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.scope import Scope
from attn_compiler.planning.words import with_phantoms

VariantLike = Variant | str | Mapping[str, object]


def read_variant(
    variant: str | Mapping[str, object],
    base: Variant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    values: Mapping[str, int | float] | None,
    layer: int,
    layers: int,
) -> Variant:
    """What `variant` makes of an attention that computes `base` by itself."""
    if not isinstance(variant, str):
        raise LanguageError(f"a variant is a Variant or the text of a mask here, not the mapping {variant!r}")
    seen = parse_mask(variant, words(), Scope(values=values or {}, layer=layer, strict=False))
    masked = with_phantoms(replace(base, mask=base.mask & seen.keep), seen)
    if isinstance(masked, Refusal):
        raise LanguageError(f"{variant!r}: {masked.reason}")
    return masked


def read_scale(scale: float | Expr | str) -> Expr:
    """A site's scale, given as a number, an expression or its text."""
    if isinstance(scale, str):
        return parse_expression(scale, words(), Scope(strict=False))
    return scale if isinstance(scale, Expr) else const(float(scale))
