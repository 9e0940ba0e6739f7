"""The best blocks that hold a share of the mass."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def top_p(p: float) -> Declared:
    """The best blocks that hold a share of the mass."""
    return Declared("selectors", "top_p", (("p", p),))
