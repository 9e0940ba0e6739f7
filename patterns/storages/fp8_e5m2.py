"""Operands held as `fp8_e5m2`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def fp8_e5m2() -> Declared:
    """Operands held as `fp8_e5m2`."""
    return Declared("storages", "fp8_e5m2", ())
