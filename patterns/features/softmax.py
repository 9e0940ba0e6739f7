"""The feature map `softmax`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def softmax() -> Declared:
    """The feature map `softmax`."""
    return Declared("features", "softmax", ())
