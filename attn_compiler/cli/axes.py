"""How a geometry is written on the command line, and how many tokens it has."""

from __future__ import annotations

import math

from attn_compiler.errors import LanguageError, ShapeError


def axes(text: str | None) -> tuple[int, ...]:
    """`56,56` or `56x56` as sizes; none where nothing is written."""
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(",")) if text else ()
    except ValueError as error:
        raise LanguageError(f'a geometry is written like "56,56", not "{text}"') from error


def tokens(size: tuple[int, ...], length: int | None) -> int:
    """The number of tokens, which a length, a geometry or both say."""
    if not size and length is None:
        raise ShapeError("say how many keys there are: --length 4096, or --geometry 64,64")
    if size and length not in (None, math.prod(size)):
        raise ShapeError(f"a geometry of {' × '.join(map(str, size))} has {math.prod(size)} tokens, and --length says {length}")
    return math.prod(size) if length is None else length
