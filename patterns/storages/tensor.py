"""One scale per tensor."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def tensor() -> Declared:
    """One scale per tensor."""
    return Declared("storages", "tensor", ())
