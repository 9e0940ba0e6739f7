"""Floats of four bits up to 6, sixteen of them with a scale in e4m3, and one scale for the tensor."""

from __future__ import annotations

from attn_compiler.algebra.storage import Numbers, Scaling


def nvfp4() -> Numbers:
    """Floats of four bits up to 6, sixteen of them with a scale in e4m3, and one scale for the tensor."""
    return Numbers("nvfp4", bits=4, mantissa=1, smallest=0, largest=6, scaling=Scaling.E4M3, block=16)
