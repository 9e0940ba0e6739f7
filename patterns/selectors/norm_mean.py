"""Blocks of keys are represented by `norm_mean`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def norm_mean() -> Declared:
    """Blocks of keys are represented by `norm_mean`."""
    return Declared("selectors", "norm_mean", ())
