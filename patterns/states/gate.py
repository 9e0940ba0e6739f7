"""A state with a learned gate, `scalar` or `vector`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def gate(how: str) -> Declared:
    """A state with a learned gate, `scalar` or `vector`."""
    return Declared("states", "gate", (("how", how),))
