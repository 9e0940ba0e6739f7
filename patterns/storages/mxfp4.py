"""Operands held as `mxfp4`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def mxfp4() -> Declared:
    """Operands held as `mxfp4`."""
    return Declared("storages", "mxfp4", ())
