"""One scale per block of tokens."""

from __future__ import annotations

from attn_compiler.algebra.storage import Shared
from attn_compiler.planning.words import Count


def block(size: Count) -> Shared:
    """One scale per block of tokens."""
    return Shared("block", size)
