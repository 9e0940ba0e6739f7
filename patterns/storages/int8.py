"""Operands held as `int8`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def int8() -> Declared:
    """Operands held as `int8`."""
    return Declared("storages", "int8", ())
