"""One scale per head."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def head() -> Declared:
    """One scale per head."""
    return Declared("storages", "head", ())
