"""Operands held as `nvfp4`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def nvfp4() -> Declared:
    """Operands held as `nvfp4`."""
    return Declared("storages", "nvfp4", ())
