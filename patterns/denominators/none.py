"""Nothing divides."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def none() -> Declared:
    """Nothing divides."""
    return Declared("denominators", "none")
