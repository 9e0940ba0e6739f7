"""One scale per tensor."""

from __future__ import annotations

from attn_compiler.algebra.storage import Shared


def tensor() -> Shared:
    """One scale per tensor."""
    return Shared("tensor")
