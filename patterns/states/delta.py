"""The state rule `delta`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def delta() -> Declared:
    """The state rule `delta`."""
    return Declared("states", "delta", ())
