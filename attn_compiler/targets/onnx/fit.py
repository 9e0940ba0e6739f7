"""Whether an attention has a body that is asked for, and why not where it has none."""

from __future__ import annotations

import math

from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.planning.layout import dilation
from attn_compiler.targets.exported import Spec
from attn_compiler.targets.linear import linear
from attn_compiler.targets.onnx.operators import not_attention, not_contrib
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.reach import Sides, sides

_ALL_OF_THEM = "a query that sees no key is of all keys"
_OPEN = "nothing bounds how far its queries see"
_APART = "each of its features fades by itself, so its weights are no products of q and k"
_LENGTHS = "its lengths change from call to call"


def refusal(spec: Spec, strategy: str, opset: int) -> str | None:
    """Why an attention has no such body; None if it has."""
    variants = [variant for _, variant in head_groups(spec.call.variant, spec.heads)]
    mixed = any(variant.mix for variant in variants)
    if mixed or strategy == "branches":
        return None if mixed and strategy == "branches" else "its branches are computed by themselves" if mixed else "it has none"
    if strategy == "contrib":
        return next(filter(None, (not_contrib(spec, variant) for variant in variants)), None)
    if strategy in ("dense", "states"):
        found = strategy == "dense" or any(linear(variant) for variant in variants)
        return None if found else "its weights are no products of features"
    if all(variant.gates is not None for variant in variants):
        return _APART
    if all(needs_all(spec, variant) for variant in variants):
        return _ALL_OF_THEM
    if strategy == "batched":
        objections = (not_attention(spec, variant, opset) for variant in variants)
        return next(filter(None, objections), None) or _side_by_side(spec, variants)
    if strategy == "matmul":
        return _side_by_side(spec, variants)
    if strategy == "listed":
        return None if is_static(spec) else _LENGTHS
    return None if any(bounded(spec, variant) for variant in variants) else _OPEN


def is_static(spec: Spec) -> bool:
    """Whether all lengths are known."""
    return isinstance(spec.q_len, int) and isinstance(spec.k_len, int)


def needs_all(spec: Spec, variant: Variant) -> bool:
    """Whether a row may be empty, and is of all keys then."""
    return variant.empty_rows is EmptyRows.UNMASKED and not spec.always_sees(variant)


def bounded(spec: Spec, variant: Variant) -> bool:
    """Whether blocks of queries that follow each other can do with some of the keys."""
    mask = spec.in_positions(variant.mask)
    if needs_all(spec, variant) or variant.gates is not None or spec.first is None:
        return False
    return sides(mask).bounded or dilation(mask) > 1


def closed(found: Sides, step: int) -> bool:
    """Whether all blocks see about equally many keys."""
    return step > 1 or math.isfinite(found.farthest - found.nearest)


def sees_alike(spec: Spec, variant: Variant) -> bool:
    """Whether blocks of queries that follow each other see about equally many keys."""
    mask = spec.in_positions(variant.mask)
    return bounded(spec, variant) and closed(sides(mask), dilation(mask))


def _side_by_side(spec: Spec, variants: list[Variant]) -> str | None:
    alike = is_static(spec) or any(sees_alike(spec, variant) for variant in variants)
    return None if alike else f"{_OPEN}, and {_LENGTHS}"
