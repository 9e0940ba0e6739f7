"""The feature map `hedgehog`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def hedgehog() -> Declared:
    """The feature map `hedgehog`."""
    return Declared("features", "hedgehog", ())
