"""A learned gate on the result: `sigmoid` or `silu`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def gate(how: str) -> Declared:
    """A learned gate on the result: `sigmoid` or `silu`."""
    return Declared("outputs", "gate", (("how", how),))
