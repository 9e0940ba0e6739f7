"""Floats of eight bits, two of them for the mantissa, up to 57344."""

from __future__ import annotations

from attn_compiler.algebra.storage import Numbers


def fp8_e5m2() -> Numbers:
    """Floats of eight bits, two of them for the mantissa, up to 57344."""
    return Numbers("fp8_e5m2", bits=8, mantissa=2, smallest=-14, largest=57344)
