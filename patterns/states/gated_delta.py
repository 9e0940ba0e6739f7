"""The state rule `gated_delta`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def gated_delta() -> Declared:
    """The state rule `gated_delta`."""
    return Declared("states", "gated_delta", ())
