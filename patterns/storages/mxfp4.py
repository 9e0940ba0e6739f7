"""Floats of four bits up to 6, thirty-two of them with a power of two (OCP Microscaling, version 1)."""

from __future__ import annotations

from attn_compiler.algebra.storage import Numbers, Scaling


def mxfp4() -> Numbers:
    """Floats of four bits up to 6, thirty-two of them with a power of two (OCP Microscaling, version 1)."""
    return Numbers("mxfp4", bits=4, mantissa=1, smallest=0, largest=6, scaling=Scaling.POWER, block=32)
