"""One scale per block of tokens."""

from __future__ import annotations

from attn_compiler.planning.words import Count, Declared


def block(size: Count) -> Declared:
    """One scale per block of tokens."""
    return Declared("storages", "block", (("size", size),))
