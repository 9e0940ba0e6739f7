"""Reads single entries of a policy: known keys, one of several words, a text of the language; errors say where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from attn_compiler.errors import LanguageError, PolicyError, did_you_mean
from attn_compiler.planning.yaml_text import Entry

Read = TypeVar("Read")


def check_keys(entry: Entry, known: tuple[str, ...], what: str) -> None:
    """Refuse keys that mean nothing."""
    assert isinstance(entry.value, Mapping)
    for key, inner in entry.value.items():
        if key not in known:
            cut = entry.flow and inner.value is None  # `{mask: window(4, 2)}` is a mask and a key `2)`
            hint = "; YAML cut the expression before it at a comma: quote it" if cut else did_you_mean(key, known)
            raise PolicyError(f'{entry.keys.get(key, entry.place)}: unknown {what} "{key}"{hint}')


def mapping(entry: Entry, known: tuple[str, ...], what: str, example: str) -> Mapping[str, Entry]:
    """A mapping that has no other keys than these."""
    if not isinstance(entry.value, Mapping):
        raise PolicyError(f"{entry.place}: expected {example}, found {entry.kind}")
    check_keys(entry, known, what)
    return entry.value


def one_of(entry: Entry, known: Sequence[str]) -> str:
    if entry.value not in known:
        hint = did_you_mean(entry.value, known) if isinstance(entry.value, str) else ""
        hint = "" if hint.startswith("; known") else hint  # they are all named
        raise PolicyError(f"{entry.place}: expected one of {', '.join(known)}, found {entry.kind}{hint}")
    return str(entry.value)


def each(entry: Entry) -> tuple[Entry, ...]:
    """The entries of a list; an entry alone is a list of one."""
    return entry.value if isinstance(entry.value, tuple) else (entry,)


def located(entry: Entry, read: Callable[[str], Read]) -> Read:
    """Read a text of the language; its errors say where in the file they are."""
    if isinstance(entry.value, bool) or not isinstance(entry.value, str | int | float):
        raise PolicyError(f"{entry.place}: expected an expression, found {entry.kind}{_quote_it(entry)}")
    try:
        return read(str(entry.value))
    except LanguageError as error:
        raise PolicyError(f"{entry.place}: {error}{_quote_it(entry)}") from error


def _quote_it(entry: Entry) -> str:
    """YAML reads a bracket that is open at a comma as the end of the text."""
    text = entry.value if isinstance(entry.value, str) else ""
    cut = any(text.count(opening) > text.count(closing) for opening, closing in ("()", "[]"))
    return "; YAML cut the expression at a comma: quote it" if cut or isinstance(entry.value, Mapping | tuple) else ""
