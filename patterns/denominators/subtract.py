"""Weights are shifted to sum to one (InLine)."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def subtract() -> Declared:
    """Weights are shifted to sum to one (InLine)."""
    return Declared("denominators", "subtract")
