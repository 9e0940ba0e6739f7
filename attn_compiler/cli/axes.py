"""How a geometry is written on the command line."""

from __future__ import annotations

from attn_compiler.errors import LanguageError


def axes(text: str | None) -> tuple[int, ...]:
    """`56,56` or `56x56` as sizes; none where nothing is written."""
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(",")) if text else ()
    except ValueError as error:
        raise LanguageError(f'a geometry is written like "56,56", not "{text}"') from error
