"""What is known of symbolic sizes without adding a guard."""

from __future__ import annotations

from torch import SymInt
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["likely", "statically_known_true"]


def likely(size: int | SymInt, unknown: int) -> int:
    """The length a trace was made with, or `unknown` where there was none."""
    if isinstance(size, int):
        return size
    if hasattr(symbolic_shapes, "optimization_hint"):  # torch 2.12 and later
        return int(symbolic_shapes.optimization_hint(size, unknown))
    return int(symbolic_shapes.size_hint(size, unknown))  # type: ignore[attr-defined]
