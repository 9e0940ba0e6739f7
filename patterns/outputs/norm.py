"""A norm on the result: `rms`."""

from __future__ import annotations

from typing import Literal

from attn_compiler.planning.words import Declared


def norm(how: Literal["rms"]) -> Declared:
    """A norm on the result: `rms`."""
    return Declared("outputs", "norm", (("how", how),))
