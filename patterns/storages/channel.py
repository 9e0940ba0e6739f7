"""One scale per channel."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def channel() -> Declared:
    """One scale per channel."""
    return Declared("storages", "channel", ())
