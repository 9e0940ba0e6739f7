"""The mean of the weights."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def mean() -> Declared:
    """The mean of the weights."""
    return Declared("denominators", "mean")
