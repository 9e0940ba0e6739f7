"""Operands held as `int4`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def int4() -> Declared:
    """Operands held as `int4`."""
    return Declared("storages", "int4", ())
