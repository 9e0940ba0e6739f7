"""A factor for each head."""

from __future__ import annotations

from attn_compiler.planning.words import Declared, TableName


def head_scale(name: TableName) -> Declared:
    """A factor for each head."""
    return Declared("outputs", "head_scale", (("name", name),))
