"""Reads the slot `storage`: how q·k, p·v, the cache and the projections are held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from attn_compiler.algebra.storage import Held, Numbers, Scaling, Shared, Storage
from attn_compiler.errors import PolicyError
from attn_compiler.planning.entries import located, mapping
from attn_compiler.planning.language import Scope, parse_call
from attn_compiler.planning.words import Words
from attn_compiler.planning.yaml_text import Entry

Wanted = TypeVar("Wanted", Numbers, Shared)

# Of each operand, what shares a scale unless a policy says it. In p·v a sum runs over tokens: a scale of one is no factor.
STORED: Mapping[str, Shared] = {
    "qk": Shared("token"), "pv": Shared("channel"), "kv_cache": Shared("token"), "projections": Shared("token"),
}  # fmt: skip


def read_storage(entry: Entry, words: Words, scope: Scope) -> Storage:
    """Read `{qk: int8, kv_cache: {type: int8, per: token}}`."""
    given = mapping(entry, tuple(STORED), "operand", "{qk: int8, kv_cache: int8}")
    return Storage(**{operand: read_held(inner, operand, words, scope) for operand, inner in given.items()})


def read_held(entry: Entry, operand: str, words: Words, scope: Scope) -> Held:
    """Read how one of the operands is held."""
    if operand == "projections" and isinstance(entry.value, Mapping) and (more := entry.value.keys() - {"type", "outliers"}):
        said = "projections have a scale for each token and each row of weights, made for what comes"
        raise PolicyError(f"{entry.place}: {said}: leave `{min(more)}` out")
    held = _held(entry, STORED[operand], words, scope)
    if operand == "pv" and len(held.largest) > 1:
        raise PolicyError(f"{entry.place}: of p·v the `largest` number is that of v: give one")
    return held


def _held(entry: Entry, usual: Shared, words: Words, scope: Scope) -> Held:
    """How one operand is held: `int8`, or `{type: int8, per: token, smooth: true}`."""
    long = entry if isinstance(entry.value, Mapping) else Entry({"type": entry}, entry.place)
    given = mapping(long, ("type", "per", "smooth", "outliers", "largest"), "key of a storage", "{type: int8, per: token}")
    if "type" not in given:
        raise PolicyError(f"{entry.place}: a storage needs a `type`, one of {', '.join(_names(words, Numbers))}")
    numbers = _word(given["type"], Numbers, "a type", words, scope)
    per: Shared | None = usual if numbers.scaling is Scaling.REAL else None
    if "per" in given:
        chosen = _word(given["per"], Shared, "what shares a scale", words, scope)
        if per is None:
            why = f"shares a scale among {numbers.block} numbers by itself" if numbers.block else "has no scales"
            raise PolicyError(f"{given['per'].place}: `{numbers.name}` {why}: leave `per` out")
        per = chosen
    smooth, outliers = _flag(given["smooth"]) if "smooth" in given else False, _outliers(given.get("outliers"))
    if "largest" not in given:
        return Held(numbers, per, smooth, outliers)
    return _fixed(given, Held(numbers, per, smooth, outliers))


def _fixed(given: Mapping[str, Entry], how: Held) -> Held:
    """The same, whose scale says what is the `largest` number, whatever comes."""
    entry = given["largest"]
    several = list(entry.value) if isinstance(entry.value, list | tuple) else [entry]
    if how.numbers.scaling is not Scaling.REAL or not 0 < len(several) < 3:
        raise PolicyError(f"{entry.place}: `largest` is one number, or one for each of two operands, of a type with scales")
    if how.smooth or not math.isinf(how.outliers) or ("per" in given and how.per != Shared("tensor")):
        raise PolicyError(f"{entry.place}: a scale that is fixed is that of the whole tensor: leave all but `type` out")
    largest = tuple(_outliers(one) for one in several)
    if not all(map(math.isfinite, largest)):
        raise PolicyError(f"{entry.place}: `largest` is a number that comes, not infinity")
    return replace(how, per=Shared("tensor"), largest=largest)


def _word(entry: Entry, wanted: type[Wanted], what: str, words: Words, scope: Scope) -> Wanted:
    found = located(entry, lambda text: parse_call(text, "storages", words, scope))
    if not isinstance(found, wanted):
        raise PolicyError(f"{entry.place}: expected {what}: {', '.join(_names(words, wanted))}; found {entry.kind}")
    return found


def _names(words: Words, wanted: type[object]) -> list[str]:
    """The words that give such values."""
    return [name for name, word in words["storages"].items() if word.hints.get("return") is wanted]


def _flag(entry: Entry) -> bool:
    if not isinstance(entry.value, bool):
        raise PolicyError(f"{entry.place}: `smooth` is true or false, found {entry.kind}")
    return entry.value


def _outliers(entry: Entry | None) -> float:
    if entry is None:
        return math.inf
    if isinstance(entry.value, bool) or not isinstance(entry.value, int | float) or not entry.value > 0:
        raise PolicyError(f"{entry.place}: expected a number above 0, found {entry.kind}")
    return float(entry.value)
