"""Documents, frames, images or turns that see only themselves."""

from __future__ import annotations

import attn_compiler.algebra.expr as e
from attn_compiler.planning.words import Label


def same(label: Label) -> e.Expr:
    """Both have the same label."""
    return e.same(label.at(e.q), label.at(e.k))
