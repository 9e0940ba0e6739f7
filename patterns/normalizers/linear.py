"""The denominators of linear attention."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def linear(denominator: str = "sum", eps: float = 1e-6) -> Declared:
    """none, sum, clamp(100), mean or subtract (InLine)."""
    return Declared("normalizers", "linear", (("denominator", denominator), ("eps", eps)))
