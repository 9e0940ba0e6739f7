"""The feature map `silu`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def silu() -> Declared:
    """The feature map `silu`."""
    return Declared("features", "silu", ())
