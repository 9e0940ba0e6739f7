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
STORED = ("qk", "pv", "kv_cache", "projections")
TYPES = ("int8", "int4", "fp8_e4m3", "fp8_e5m2", "nvfp4", "mxfp4", "bf16", "fp16")


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

    def storage(self, entry: Entry) -> object:
        given = mapping(entry, STORED, "operand", "{qk: int8, kv_cache: int8}")
        return {operand: self._held(held) for operand, held in given.items()}

    def _held(self, entry: Entry) -> object:
        """How one operand is stored: `int8`, or `{type: int8, per: token, smooth: true}`."""
        long = entry if isinstance(entry.value, Mapping) else Entry({"type": entry}, entry.place)
        given = mapping(long, ("type", "per", "smooth", "outliers"), "key of a storage", "{type: int8, per: token}")
        if "type" not in given:
            raise PolicyError(f"{entry.place}: a storage needs a `type`, one of {', '.join(TYPES)}")
        held: dict[str, object] = {"type": self._storage_word(given["type"], types=True)}
        if "per" in given:
            held["per"] = self._storage_word(given["per"], types=False)
        if "smooth" in given and not isinstance(given["smooth"].value, bool):
            raise PolicyError(f"{given['smooth'].place}: `smooth` is true or false, found {given['smooth'].kind}")
        if given.get("smooth", entry).value is True:
            held["smooth"] = True
        if "outliers" in given:
            held["outliers"] = _positive(given["outliers"])
        return held

    def _storage_word(self, entry: Entry, *, types: bool) -> Declared:
        word = self.call(entry, "storages")
        if (word.name in TYPES) is not types:
            expected = f"a type: {', '.join(TYPES)}" if types else "what shares a scale: tensor, head, token, channel, block(64)"
            raise PolicyError(f"{entry.place}: expected {expected}; found {entry.kind}")
        return word

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
    "storage": Later.storage,
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


def _positive(entry: Entry) -> float:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int | float) or not entry.value > 0:
        raise PolicyError(f"{entry.place}: expected a number above 0, found {entry.kind}")
    return float(entry.value)
