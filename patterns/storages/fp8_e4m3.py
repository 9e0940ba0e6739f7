"""Floats of eight bits, three of them for the mantissa, up to 448."""

from __future__ import annotations

from attn_compiler.algebra.storage import Numbers


def fp8_e4m3() -> Numbers:
    """Floats of eight bits, three of them for the mantissa, up to 448."""
    return Numbers("fp8_e4m3", bits=8, mantissa=3, smallest=-6, largest=448)
