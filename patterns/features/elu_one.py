"""The feature map `elu_one`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def elu_one() -> Declared:
    """The feature map `elu_one`."""
    return Declared("features", "elu_one", ())
