"""Learned keys and values are added."""

from __future__ import annotations

from attn_compiler.planning.words import Declared, TableName


def extra(name: TableName) -> Declared:
    """Learned keys and values are added."""
    return Declared("contexts", "extra", (("name", name),))
