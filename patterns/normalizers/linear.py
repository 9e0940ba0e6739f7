"""The denominators of linear attention."""

from __future__ import annotations

from attn_compiler.planning.words import Declared, Denominator

SUM = Declared("denominators", "sum")


def linear(denominator: Denominator = SUM, eps: float = 1e-6) -> Declared:
    """none, sum, clamp(100), mean or subtract (InLine), plus eps."""
    return Declared("normalizers", "linear", (("denominator", denominator), ("eps", eps)))
