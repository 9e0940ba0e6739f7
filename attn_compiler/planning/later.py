"""Slots that nothing carries yet: they are checked, so that a policy that loads stays one that loads, and kept as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from attn_compiler.errors import PolicyError, did_you_mean
from attn_compiler.planning.entries import each, located, mapping, one_of
from attn_compiler.planning.language import Scope, parse_call
from attn_compiler.planning.words import Declared, Words
from attn_compiler.planning.yaml_text import Entry

HOW = ("sum", "gate", "lse", "shared_denominator", "lerp")
OPERANDS = ("q", "k", "v", "gate")
RECORDED = ("q", "k", "v", "q_unrotated", "k_unrotated", "x")


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

    def operands(self, entry: Entry) -> object:
        given = mapping(entry, OPERANDS, "operand", "{q: q_unrotated, k: k_unrotated}")
        return {name: one_of(inner, RECORDED) for name, inner in given.items()}

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
    "feature": lambda later, entry: later.call(entry, "features"),
    "state": lambda later, entry: later.call(entry, "states"),
    "operands": Later.operands,
    "context": lambda later, entry: later.calls(entry, "contexts"),
    "edit": lambda later, entry: later.calls(entry, "edits"),
    "output": lambda later, entry: later.calls(entry, "outputs"),
    "emit": Later.emit,
}


def read_mix(entry: Entry, branch: Callable[[Entry], object]) -> object:
    """How branches are mixed: each is a variant; their weights are numbers or names of parameters."""
    given = mapping(entry, ("how", "branches", "weights"), "key of a mix", "{how: …, branches: {…}}")
    if "how" not in given or "branches" not in given:
        raise PolicyError(f"{entry.place}: a mix needs `how` and `branches`")
    how = one_of(given["how"], HOW)
    branches = given["branches"]
    if not isinstance(branches.value, Mapping):
        raise PolicyError(f"{branches.place}: expected branches by name, found {branches.kind}")
    read = {name: branch(inner) for name, inner in branches.value.items()}
    weights = _weights(given["weights"], tuple(read)) if "weights" in given else None
    return how, tuple(sorted(read.items(), key=lambda item: item[0])), weights


def _weights(entry: Entry, branches: Sequence[str]) -> object:
    """One for all branches, or one for each by its name."""
    if not isinstance(entry.value, Mapping):
        return _weight(entry)
    for name in entry.value:
        if name not in branches:
            raise PolicyError(f'{entry.keys.get(name, entry.place)}: there is no branch "{name}"{did_you_mean(name, branches)}')
    return {name: _weight(inner) for name, inner in entry.value.items()}


def _weight(entry: Entry) -> str | float:
    if isinstance(entry.value, bool) or not isinstance(entry.value, str | int | float):
        raise PolicyError(f"{entry.place}: a weight is a number or the name of a parameter, found {entry.kind}")
    return entry.value


def _count(entry: Entry) -> int:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int) or entry.value < 1:
        raise PolicyError(f"{entry.place}: expected a whole number of at least 1, found {entry.kind}")
    return entry.value
