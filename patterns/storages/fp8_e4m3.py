"""Operands held as `fp8_e4m3`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def fp8_e4m3() -> Declared:
    """Operands held as `fp8_e4m3`."""
    return Declared("storages", "fp8_e4m3", ())
