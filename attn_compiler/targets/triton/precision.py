"""As what products of float32 are multiplied: exactly or, where that is asked for, as TF32, which rounds as float16 does."""

from __future__ import annotations

TF32 = "tfloat32"  # the name of float32 that is multiplied so


def in_memory(dtype: str) -> str:
    """How numbers are held that are multiplied as those of a dtype."""
    return "float32" if dtype == TF32 else dtype


def multiplied_as(text: str, dtype: str) -> str:
    """A kernel, which multiplies float32 exactly, as one whose operands are of `dtype`."""
    return text.replace('input_precision="ieee"', 'input_precision="tf32"') if dtype == TF32 else text
