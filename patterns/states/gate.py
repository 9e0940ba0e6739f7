"""A state with a learned gate, `scalar` or `vector`."""

from __future__ import annotations

from typing import Literal

from attn_compiler.planning.words import Declared


def gate(how: Literal["scalar", "vector"]) -> Declared:
    """A state with a learned gate, `scalar` or `vector`."""
    return Declared("states", "gate", (("how", how),))
