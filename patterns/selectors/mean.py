"""Blocks of keys are represented by `mean`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def mean() -> Declared:
    """Blocks of keys are represented by `mean`."""
    return Declared("selectors", "mean", ())
