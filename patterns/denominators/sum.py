"""The sum of the weights."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def sum() -> Declared:
    """The sum of the weights."""
    return Declared("denominators", "sum")
