"""One scale per token."""

from __future__ import annotations

from attn_compiler.algebra.storage import Shared


def token() -> Shared:
    """One scale per token."""
    return Shared("token")
