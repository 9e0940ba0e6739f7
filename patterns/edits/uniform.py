"""Attention that is the same for all keys."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def uniform() -> Declared:
    """Attention that is the same for all keys."""
    return Declared("edits", "uniform", ())
