"""Slots that nothing carries yet: they are checked, so that a policy that loads stays one that loads, and kept as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attn_compiler.errors import PolicyError
from attn_compiler.planning.entries import each, located, mapping, one_of
from attn_compiler.planning.language import Scope, parse_call
from attn_compiler.planning.words import Declared, Words
from attn_compiler.planning.yaml_text import Entry


@dataclass(frozen=True)
class Later:
    """Reads such slots with the words of a scope."""

    words: Words
    scope: Scope

    def read(self, slot: str, entry: Entry) -> object:
        """What a slot says, as values that compare."""
        return SLOTS_LATER[slot](self, entry)

    def call(self, entry: Entry, folder: str) -> Declared:
        found = located(entry, lambda text: parse_call(text, folder, self.words, self.scope))
        if not isinstance(found, Declared):
            raise PolicyError(f"{entry.place}: a word of {folder} is only declared in this version")
        return found

    def over(self, entry: Entry) -> object:
        return one_of(entry, ("tokens", "channels"))

    def emit(self, entry: Entry) -> object:
        return tuple(one_of(one, ("rows", "columns", "column_sums")) for one in each(entry))

    def select(self, entry: Entry) -> object:
        known = ("size", "represent", "choose", "scope", "always")
        given = mapping(entry, known, "key of `select`", "{size: 64, represent: mean, choose: top(16)}")
        read: Mapping[str, Callable[[Entry], object]] = {
            "size": _count,
            "represent": lambda inner: self.call(inner, "selectors"),
            "choose": lambda inner: self.call(inner, "selectors"),
            "scope": lambda inner: one_of(inner, ("head", "shared", "token")),
            "always": lambda inner: tuple(sorted({one_of(one, ("first", "self")) for one in each(inner)})),
        }
        if "size" not in given:
            raise PolicyError(f"{entry.place}: `select` needs the `size` of its blocks of keys")
        return {key: read[key](inner) for key, inner in given.items()}

    def calls(self, entry: Entry, folder: str) -> tuple[Declared, ...]:
        return tuple(self.call(one, folder) for one in each(entry))


SLOTS_LATER: Mapping[str, Callable[[Later, Entry], object]] = {
    "over": Later.over,
    "select": Later.select,
    "edit": lambda later, entry: later.calls(entry, "edits"),
    "emit": Later.emit,
}


def _count(entry: Entry) -> int:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int) or entry.value < 1:
        raise PolicyError(f"{entry.place}: expected a whole number of at least 1, found {entry.kind}")
    return entry.value
