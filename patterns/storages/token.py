"""One scale per token."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def token() -> Declared:
    """One scale per token."""
    return Declared("storages", "token", ())
