"""The state rule `sum`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def sum() -> Declared:
    """The state rule `sum`."""
    return Declared("states", "sum", ())
