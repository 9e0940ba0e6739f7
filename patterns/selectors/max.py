"""Blocks of keys are represented by `max`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def max() -> Declared:
    """Blocks of keys are represented by `max`."""
    return Declared("selectors", "max", ())
