"""Keys and values beside those of the tokens: memory, prefixes, registers."""

from __future__ import annotations

from attn_compiler.algebra.context import Context
from attn_compiler.planning.words import Count


def extra(name: str, count: Count = 1, per_row: bool = False) -> Context:
    """So many keys and values that every query sees: tables name_k and name_v, [layers, kv heads, count, dim] or by row."""
    return Context("extra", (count,), (), name, per_row)
