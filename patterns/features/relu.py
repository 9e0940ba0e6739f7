"""The feature map `relu`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def relu() -> Declared:
    """The feature map `relu`."""
    return Declared("features", "relu", ())
