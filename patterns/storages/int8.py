"""Whole numbers from -127 to 127, or from 0 to 255 where nothing is negative."""

from __future__ import annotations

from attn_compiler.algebra.storage import Numbers


def int8() -> Numbers:
    """Whole numbers from -127 to 127, or from 0 to 255 where nothing is negative."""
    return Numbers("int8", bits=8, mantissa=7, smallest=7, largest=127, unsigned=255)
