"""Moves attention mass from tokens to others."""

from __future__ import annotations

from attn_compiler.planning.words import Declared, Tokens


def move(source: Tokens, target: Tokens, keep: float) -> Declared:
    """Moves attention mass from tokens to others."""
    return Declared("edits", "move", (("source", source), ("target", target), ("keep", keep)))
