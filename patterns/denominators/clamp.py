"""The sum of the weights, but never too little."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def clamp(least: float) -> Declared:
    """The sum of the weights, at least a number."""
    return Declared("denominators", "clamp", (("least", least),))
