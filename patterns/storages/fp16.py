"""Operands held as `fp16`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def fp16() -> Declared:
    """Operands held as `fp16`."""
    return Declared("storages", "fp16", ())
