"""Whole numbers from -7 to 7, or from 0 to 15 where nothing is negative."""

from __future__ import annotations

from attn_compiler.algebra.storage import Numbers


def int4() -> Numbers:
    """Whole numbers from -7 to 7, or from 0 to 15 where nothing is negative."""
    return Numbers("int4", bits=4, mantissa=3, smallest=3, largest=7, unsigned=15)
