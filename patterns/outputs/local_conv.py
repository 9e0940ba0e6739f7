"""A depthwise convolution of v added to the result."""

from __future__ import annotations

from attn_compiler.planning.words import Count, Declared


def local_conv(size: Count) -> Declared:
    """A depthwise convolution of v added to the result."""
    return Declared("outputs", "local_conv", (("size", size),))
