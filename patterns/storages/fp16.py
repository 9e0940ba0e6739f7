"""Floats of sixteen bits, ten of them for the mantissa, unscaled, up to 65504."""

from __future__ import annotations

from attn_compiler.algebra.storage import Numbers, Scaling


def fp16() -> Numbers:
    """Floats of sixteen bits, ten of them for the mantissa, unscaled, up to 65504."""
    return Numbers("fp16", bits=16, mantissa=10, smallest=-14, largest=65504, scaling=Scaling.NONE)
