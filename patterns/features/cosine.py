"""The feature map `cosine`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def cosine() -> Declared:
    """The feature map `cosine`."""
    return Declared("features", "cosine", ())
