"""The feature map `identity`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def identity() -> Declared:
    """The feature map `identity`."""
    return Declared("features", "identity", ())
