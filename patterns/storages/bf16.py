"""Operands held as `bf16`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def bf16() -> Declared:
    """Operands held as `bf16`."""
    return Declared("storages", "bf16", ())
