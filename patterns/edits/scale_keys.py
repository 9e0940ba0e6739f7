"""Scales the attention that keys get."""

from __future__ import annotations

from attn_compiler.planning.words import Declared, Number, Tokens


def scale_keys(set: Tokens, factor: Number) -> Declared:
    """Scales the attention that keys get."""
    return Declared("edits", "scale_keys", (("set", set), ("factor", factor)))
