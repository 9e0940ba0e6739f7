"""Keys and values are pooled."""

from __future__ import annotations

from attn_compiler.planning.words import Count, Declared


def pool(size: Count) -> Declared:
    """Keys and values are pooled."""
    return Declared("contexts", "pool", (("size", size),))
