"""Floats of sixteen bits, seven of them for the mantissa, unscaled."""

from __future__ import annotations

from attn_compiler.algebra.storage import Numbers, Scaling


def bf16() -> Numbers:
    """Floats of sixteen bits, seven of them for the mantissa, unscaled."""
    return Numbers("bf16", bits=16, mantissa=7, smallest=-126, largest=(2 - 2**-7) * 2.0**127, scaling=Scaling.NONE)
