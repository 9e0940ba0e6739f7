"""Reads the variant of a call: a mask text or a mapping of slots means what it means in a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from attn_compiler import library
from attn_compiler.algebra.expr import Expr, const
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import LanguageError
from attn_compiler.planning.language import Scope, parse_expression
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.resolve import resolve
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.planning.slots import Naming, read_slots
from attn_compiler.planning.words import Words
from attn_compiler.planning.yaml_text import entry_of

VariantLike = Variant | str | Mapping[str, object]


@dataclass(frozen=True)
class _Given:
    """What a caller wrote, under words that it was read with: equal where all of it looks the same."""

    text: str
    slots: Mapping[str, object] = field(compare=False)
    values: Mapping[str, int | float] = field(compare=False)
    words: Words = field(compare=False)
    number_of_words: int  # that of the object, which is kept here, so that no other one gets it


def read_variant(
    variant: VariantLike,
    base: Variant,
    *,
    heads: int,
    kv_heads: int,
    q_len: int,
    k_len: int,
    head_dim: int,
    values: Mapping[str, int | float] | None,
    layer: int,
    layers: int,
) -> Variant:
    """What `variant` makes of an attention that computes `base` by itself. A plain text is a mask."""
    if isinstance(variant, Variant):
        return _alone(variant)
    slots, words = {"mask": variant} if isinstance(variant, str) else variant, library.words()
    given = _Given(repr((slots, values)), slots, dict(values or {}), words, id(words))
    sizes = (layer, layers, 1, heads, kv_heads, q_len, k_len, head_dim, head_dim)
    read = _read if all(type(size) is int for size in sizes) else _read.__wrapped__  # symbols cannot be looked up
    return read(given, base, sizes)


@lru_cache(maxsize=512)
def _read(given: _Given, base: Variant, sizes: tuple[int, ...]) -> Variant:
    layer, layers, batch, heads, kv_heads, q_len, k_len, dim, value_dim = sizes
    naming = Naming(given.words, values=given.values, layer=layer, strict=False)
    slots = read_slots(entry_of(given.slots, "variant"), naming)
    if slots is None:
        return base
    site = Site(
        "attend", Kind.SELF, Phase.PREFILL, layer, layers, batch, heads, kv_heads, q_len, k_len, dim, value_dim, "", base,
        Frame(), q_len, k_len,
    )  # fmt: skip
    resolved = resolve(slots, site)
    if isinstance(resolved, Refusal):
        raise LanguageError(f"this variant cannot be computed: {resolved.reason}")
    return resolved


def _alone(variant: Variant) -> Variant:
    """The same variant, which asks for nothing around the attention."""
    if any(part.storage.projections for part in variant.parts()):
        reason = "its `storage` holds `projections` otherwise, layers around an attention, of which this call knows nothing"
        raise LanguageError(f"this variant cannot be computed: {reason}: ask for them in a policy of a compiled model")
    return variant


def read_scale(scale: float | Expr | str) -> Expr:
    """A site's scale, given as a number, an expression or its text."""
    if isinstance(scale, str):
        return parse_expression(scale, library.words(), Scope(strict=False))
    return scale if isinstance(scale, Expr) else const(float(scale))
