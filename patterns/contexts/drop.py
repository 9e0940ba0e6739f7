"""Keys and values are dropped."""

from __future__ import annotations

from attn_compiler.planning.words import Declared, TableName


def drop(name: TableName) -> Declared:
    """Keys and values are dropped."""
    return Declared("contexts", "drop", (("name", name),))
