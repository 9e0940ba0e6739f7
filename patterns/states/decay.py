"""A state that decays by itself."""

from __future__ import annotations

from attn_compiler.planning.words import Declared, Number


def decay(slopes: Number) -> Declared:
    """A state that decays by itself."""
    return Declared("states", "decay", (("slopes", slopes),))
