"""Block-causal frames or turns."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, q
from attn_compiler.planning.words import Label


def before(label: Label) -> Expr:
    """The label of k is at most the label of q."""
    return label.at(k) <= label.at(q)
