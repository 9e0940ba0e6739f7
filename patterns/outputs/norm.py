"""A norm on the result: `rms`."""

from __future__ import annotations

from attn_compiler.planning.words import Declared


def norm(how: str) -> Declared:
    """A norm on the result: `rms`."""
    return Declared("outputs", "norm", (("how", how),))
