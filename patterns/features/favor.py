"""Positive random features."""

from __future__ import annotations

from attn_compiler.planning.words import Count, Declared


def favor(features: Count = 256) -> Declared:
    """Positive random features."""
    return Declared("features", "favor", (("features", features),))
