"""A learned gate on the result: `sigmoid` or `silu`."""

from __future__ import annotations

from typing import Literal

from attn_compiler.planning.words import Declared


def gate(how: Literal["sigmoid", "silu"]) -> Declared:
    """A learned gate on the result: `sigmoid` or `silu`."""
    return Declared("outputs", "gate", (("how", how),))
