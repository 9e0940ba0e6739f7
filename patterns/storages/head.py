"""One scale per head."""

from __future__ import annotations

from attn_compiler.algebra.storage import Shared


def head() -> Shared:
    """One scale per head."""
    return Shared("head")
