"""Queries and keys as they are."""

from __future__ import annotations

from attn_compiler.algebra.feature import IDENTITY, Feature


def identity() -> Feature:
    """q and k themselves."""
    return IDENTITY
