"""Reads the variant of a call: a mask text or a mapping of slots means what it means in a policy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attn_compiler.algebra.expr import Expr, const
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import LanguageError

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
    raise LanguageError(f"only a Variant can be attended with here, not the text or mapping {variant!r}")


def read_scale(scale: float | Expr | str) -> Expr:
    """A site's scale, given as a number, an expression or its text."""
    if isinstance(scale, str):
        raise LanguageError(f"a scale is a number or an expression here, not the text {scale!r}")
    return scale if isinstance(scale, Expr) else const(float(scale))
