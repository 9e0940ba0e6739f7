"""An order from a file."""

from __future__ import annotations

import attn_compiler.algebra.expr as e
from attn_compiler.planning.words import PerToken, TableName


def table(name: TableName) -> PerToken:
    """An order given by a table [tokens] of original positions, read through its inverse, the table `<name>.inverse`."""
    return PerToken(e.table(f"{name}.inverse", e.k))
