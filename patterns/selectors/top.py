"""The n best blocks, or a fraction of all."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def top(n: float) -> Declared:
    """The n best blocks, or a fraction of all."""
    return Declared("selectors", "top", (("n", n),))
