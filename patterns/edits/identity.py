"""Mixes in the token itself."""

from __future__ import annotations

from attn_compiler.planning.words import Declared, Number


def identity(u: Number) -> Declared:
    """Mixes in the token itself."""
    return Declared("edits", "identity", (("u", u),))
