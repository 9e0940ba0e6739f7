"""Blocks of at least this weight."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def threshold(least: float) -> Declared:
    """Blocks of at least this weight."""
    return Declared("selectors", "threshold", (("least", least),))
