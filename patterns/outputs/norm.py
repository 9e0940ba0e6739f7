"""A norm on the result, as after the gated delta rule."""

from __future__ import annotations

from typing import Literal

from attn_compiler.algebra.expr import Expr, sqrt
from attn_compiler.algebra.output import mean_square, x
from attn_compiler.planning.words import Number


def norm(how: Literal["rms"], eps: Number = 1e-6) -> Expr:  # type: ignore[assignment]
    """`rms`: each head's result over the root of the mean of its squares."""
    assert how == "rms"
    return x / sqrt(mean_square + eps)
