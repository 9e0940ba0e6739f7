"""One scale per channel."""

from __future__ import annotations

from attn_compiler.algebra.storage import Shared


def channel() -> Shared:
    """One scale per channel."""
    return Shared("channel")
