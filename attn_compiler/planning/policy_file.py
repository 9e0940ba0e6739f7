"""Reads a policy file: strictly, with every error at its place, and a digest of what it means."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from keyword import iskeyword
from pathlib import Path
from typing import TypeVar

from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.notation import text
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import DerivedTable, EmptyRows
from attn_compiler.errors import AttnError, LanguageError, PolicyError
from attn_compiler.planning.entries import check_keys
from attn_compiler.planning.measured import beside, read_measured
from attn_compiler.planning.parameter_file import steps_of
from attn_compiler.planning.policy import Match, Policy, Rule
from attn_compiler.planning.site import Kind, Phase
from attn_compiler.planning.slots import Naming, Slots, read_geometry, read_slots
from attn_compiler.planning.sources import Array, Source, read_data, read_source
from attn_compiler.planning.words import Words
from attn_compiler.planning.yaml_text import Entry, entry_of, read_yaml

FILE_KEYS = ("version", "because", "geometries", "roles", "labels", "data", "variants", "parameters", "rules")
RULE_KEYS = ("name", "because", "match", "attn", "also", "replace_mask", "fallback", "tolerance", "untrained")
MATCH_KEYS = ("module", "kind", "layers", "phase", "min_tokens", "max_tokens")
Named = TypeVar("Named", bound=Enum)
Read = TypeVar("Read")


class AnySize(dict[str, int | float]):
    """Stands for the compile-time values while a policy is only being read: every name has one of its own."""

    def __missing__(self, name: str) -> int:
        return (1 << 48) + int.from_bytes(hashlib.sha256(name.encode()).digest()[:5], "big")

    def get(self, name: str, default: object = None) -> int | float:
        return self[name]


def read_policy(source: str | Path | Mapping[str, object], words: Words, words_digest: str) -> Policy:
    """Read a policy from a path, YAML text or a mapping. All that is wrong with it is one error."""
    if isinstance(source, Mapping):
        return _policy(entry_of(source), Path(), words, words_digest, "given mapping")
    if not isinstance(source, str | Path):
        raise PolicyError(f"a policy is a path, the name of a ready policy, YAML text or a mapping, not {type(source).__name__}")
    if isinstance(source, str) and ("\n" in source or ": " in source or not source.strip()):
        return _policy(read_yaml(source, "policy"), Path(), words, words_digest, "given text")
    path = Path(source)
    try:
        written = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PolicyError(
            f"there is no policy file {source}; give a path, the name of a ready policy, YAML text or a mapping"
        ) from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"the policy file {source} cannot be read: it is no text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise PolicyError(f"the policy file {source} cannot be read: {error.strerror}") from error
    policy = _policy(read_yaml(written, path.name), path.parent, words, words_digest, path.stem)
    measured = read_measured(beside(path), policy.digest)
    return policy if measured is None else policy.with_measurements(measured)


class _Problems:
    """All errors of a file, so that one reading shows them all."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, read: Callable[..., Read], *arguments: object) -> Read | None:
        try:
            return read(*arguments)
        except AttnError as error:
            self.found.append(str(error))
            return None

    def finish(self) -> None:
        if self.found:
            raise PolicyError("\n".join(dict.fromkeys(self.found)))


def _policy(entry: Entry, folder: Path, words: Words, words_digest: str, name: str) -> Policy:
    file = entry.value
    if not isinstance(file, Mapping):
        raise PolicyError(f"{entry.place}: a policy is a mapping with `version` and `rules`, found {entry.kind}")
    problems = _Problems()
    problems.attempt(check_keys, entry, FILE_KEYS, "key")
    problems.attempt(_check_version, entry)
    naming, tables, learned = _naming(file, folder, words, problems)
    rules = problems.attempt(_rules, file.get("rules", entry_of([])), naming, problems) or ()
    for variant in naming.variants.values():
        _check_slots(variant, naming, problems)
    parameters = problems.attempt(_text, file["parameters"]) if "parameters" in file else None
    because = problems.attempt(_text, file["because"]) if "because" in file else None
    problems.finish()
    trained = not (parameters and steps_of(folder / parameters) == 0)
    read = Policy(rules, naming, tables, name, because or "", parameters or "", folder=folder, learned=learned, trained=trained)
    digest = _digest(read, folder, words_digest)
    return replace(read, digest=digest, naming=replace(naming, values={}))


def _check_version(entry: Entry) -> None:
    assert isinstance(entry.value, Mapping)
    if "version" not in entry.value:
        raise PolicyError(f"{entry.place}: `version: 1` is missing")
    version = entry.value["version"]
    if version.value != 1 or type(version.value) is not int:  # neither `true` nor `1.0`
        hint = "; a newer release of attn-compiler may read it" if type(version.value) is int and version.value > 1 else ""
        raise PolicyError(f"{version.place}: this release reads policies of version 1, found {version.kind}{hint}")


def _naming(
    file: Mapping[str, Entry], folder: Path, words: Words, problems: _Problems
) -> tuple[Naming, dict[str, Source], frozenset[str]]:
    """All names of the file, the tables behind them, and which of these are parameters."""
    sections = {key: _section(file, key, problems) for key in ("geometries", "roles", "labels", "data", "variants")}
    _check_names(sections, problems)
    tables: dict[str, Source] = {}
    roles: dict[str, IntegerSet | str] = {}
    for name, entry in sections["roles"].items():
        if isinstance(entry.value, str | int) and not isinstance(entry.value, bool):
            positions = problems.attempt(_integers, entry)
            roles[name] = positions or IntegerSet(())
        else:
            _add(tables, name, problems.attempt(read_source, name, entry, folder, "truth values"))
            roles[name] = name
    for name, entry in sections["labels"].items():
        _add(tables, name, problems.attempt(read_source, name, entry, folder, "whole numbers"))
    for name, entry in sections["data"].items():
        held = problems.attempt(_data, entry, folder) or {}
        tables |= {(f"{name}.{inner}" if inner else name): Source("held", name, array) for inner, array in held.items()}
    parameters = problems.attempt(_parameters, file["parameters"], folder) if "parameters" in file else None
    for name, array in (parameters or {}).items():
        if name in tables:
            problems.found.append(f'{file["parameters"].place}: the parameter "{name}" is the name of a table already')
        tables[name] = Source("held", name, array)
    naming = Naming(
        words=words, geometries=sections["geometries"], roles=roles, labels={name: name for name in sections["labels"]},
        data=frozenset(tables), variants=sections["variants"], values=AnySize(),
        strict=parameters != {},  # while nobody has written the file, any name may be that of a parameter
    )  # fmt: skip
    for entry in naming.geometries.values():
        problems.attempt(read_geometry, entry, naming.values)
    return naming, tables, frozenset(parameters or {})


def _parameters(entry: Entry, folder: Path) -> dict[str, Array]:
    """What the file of parameters holds; nothing where it is still to be written."""
    written = _text(entry)
    return read_data(written, entry.place, folder) if (folder / written).is_file() else {}


def _check_names(sections: Mapping[str, Mapping[str, Entry]], problems: _Problems) -> None:
    """One name stands for one thing, and expressions can say it."""
    taken: dict[str, str] = {}
    for key in ("roles", "labels", "data"):
        for name, entry in sections[key].items():
            if not name.isidentifier() or iskeyword(name):
                such = "a word of Python" if iskeyword(name) else "not made of letters, digits and `_` alone"
                problems.found.append(f'{entry.place}: no expression can say "{name}", which is {such}; give it another name')
            if name in taken:
                problems.found.append(f'{entry.place}: "{name}" stands among `{taken[name]}` already; give it another name')
            taken.setdefault(name, key)
    if "exact" in sections["variants"]:
        place = sections["variants"]["exact"].place
        problems.found.append(f"{place}: `exact` is what the site itself computes; give the variant another name")


def _data(entry: Entry, folder: Path) -> Mapping[str, Array]:
    return read_data(_text(entry), entry.place, folder)


def _add(tables: dict[str, Source], name: str, source: Source | None) -> None:
    if source is not None:
        tables[name] = source


def _section(file: Mapping[str, Entry], key: str, problems: _Problems) -> Mapping[str, Entry]:
    entry = file.get(key)
    if entry is None:
        return {}
    if not isinstance(entry.value, Mapping):
        problems.found.append(f"{entry.place}: `{key}` is a mapping from names, found {entry.kind}")
        return {}
    return entry.value


def _rules(entry: Entry, naming: Naming, problems: _Problems) -> tuple[Rule, ...]:
    if not isinstance(entry.value, tuple):
        raise PolicyError(f"{entry.place}: `rules` is a list, found {entry.kind}")
    read = (problems.attempt(_rule, n, one, naming, problems) for n, one in enumerate(entry.value, 1))
    return tuple(rule for rule in read if rule is not None)


def _rule(number: int, entry: Entry, naming: Naming, problems: _Problems) -> Rule:
    if not isinstance(entry.value, Mapping):
        raise PolicyError(f"{entry.place}: a rule is a mapping with `match` and `attn`, found {entry.kind}")
    given = entry.value
    problems.attempt(check_keys, entry, RULE_KEYS, "key of a rule")
    if "attn" not in given:
        raise PolicyError(f"{entry.place}: rule {number} has no `attn`: `exact`, the name of a variant, or slots")
    _check_slots(given["attn"], naming, problems)
    tolerance = {key: _number(inner) for key, inner in _mapping(given, "tolerance", ("site", "logits")).items()}
    return Rule(
        number,
        (problems.attempt(_match, given["match"]) if "match" in given else None) or Match(),
        given["attn"],
        name=_text(given["name"]) if "name" in given else "",
        because=_text(given["because"]) if "because" in given else "",
        also=_flag(given, "also"),
        replace_mask=_flag(given, "replace_mask"),
        fallback="error" if _choice(given, "fallback", ("exact", "error")) == "error" else "exact",
        tolerance=tolerance,
        untrained="allow" if _choice(given, "untrained", ("refuse", "allow")) == "allow" else "refuse",
    )


def _check_slots(entry: Entry, naming: Naming, problems: _Problems) -> None:
    """Read the slots together, and where that fails one by one, so that no fault hides another."""
    whole = len(problems.found)
    problems.attempt(read_slots, entry, naming)
    if len(problems.found) == whole or not isinstance(entry.value, Mapping):
        return
    places = {slot: inner for slot, inner in entry.value.items() if slot in ("geometry", "order")}  # others may speak of these
    for slot, inner in entry.value.items():
        if slot not in ("heads", "mix"):  # what stands beside these holds in them
            problems.attempt(read_slots, replace(entry, value={**places, slot: inner}), naming)


def _match(entry: Entry) -> Match:
    if not isinstance(entry.value, Mapping):
        raise PolicyError(f"{entry.place}: `match` is a mapping, {{}} matches every site; found {entry.kind}")
    given = entry.value
    check_keys(entry, MATCH_KEYS, "key of `match`")
    counts = {key: _count(given[key]) for key in ("min_tokens", "max_tokens") if key in given}
    if counts.get("min_tokens", 0) > counts.get("max_tokens", counts.get("min_tokens", 0)):
        raise PolicyError(f"{given['max_tokens'].place}: `max_tokens` is at least `min_tokens`, {counts['min_tokens']}")
    return Match(
        _text(given["module"]) if "module" in given else None,
        _several(given["kind"], Kind) if "kind" in given else (),
        _integers(given["layers"]) if "layers" in given else None,
        _several(given["phase"], Phase) if "phase" in given else (),
        counts.get("min_tokens"),
        counts.get("max_tokens"),
    )


def _mapping(given: Mapping[str, Entry], key: str, known: tuple[str, ...]) -> Mapping[str, Entry]:
    if key not in given:
        return {}
    entry = given[key]
    if not isinstance(entry.value, Mapping):
        raise PolicyError(f"{entry.place}: `{key}` is a mapping with {' and '.join(known)}, found {entry.kind}")
    check_keys(entry, known, f"key of `{key}`")
    return entry.value


def _text(entry: Entry) -> str:
    if not isinstance(entry.value, str):
        raise PolicyError(f"{entry.place}: expected a text, found {entry.kind}")
    return entry.value


def _number(entry: Entry) -> float:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int | float) or entry.value < 0:
        raise PolicyError(f"{entry.place}: expected a number of at least 0, found {entry.kind}")
    return float(entry.value)


def _count(entry: Entry) -> int:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int) or entry.value < 0:
        raise PolicyError(f"{entry.place}: expected a number of tokens, found {entry.kind}")
    return entry.value


def _integers(entry: Entry) -> IntegerSet:
    if isinstance(entry.value, bool) or not isinstance(entry.value, str | int):
        raise PolicyError(f'{entry.place}: expected a set of integers like "0:4, -1", found {entry.kind}')
    try:
        return IntegerSet.parse(entry.value)
    except LanguageError as error:
        raise PolicyError(f"{entry.place}: {error}") from error


def _flag(given: Mapping[str, Entry], key: str) -> bool:
    if key not in given:
        return False
    value = given[key].value
    if not isinstance(value, bool):
        raise PolicyError(f"{given[key].place}: `{key}` is true or false, found {given[key].kind}")
    return value


def _choice(given: Mapping[str, Entry], key: str, known: Sequence[str]) -> str:
    if key not in given:
        return known[0]
    if given[key].value not in known:
        raise PolicyError(f"{given[key].place}: `{key}` is {' or '.join(known)}, found {given[key].kind}")
    return str(given[key].value)


def _several(entry: Entry, names: type[Named]) -> tuple[Named, ...]:
    entries = entry.value if isinstance(entry.value, tuple) else (entry,)
    known = {member.value: member for member in names}
    for one in entries:
        if not isinstance(one.value, str) or one.value not in known:
            raise PolicyError(f"{one.place}: expected {', '.join(known)} or a list of them, found {one.kind}")
    if not entries:
        raise PolicyError(f"{entry.place}: expected {', '.join(known)} or a list of them, found an empty list")
    chosen = {one.value for one in entries}
    return tuple(member for name, member in known.items() if name in chosen)


def _digest(policy: Policy, folder: Path, words_digest: str) -> str:
    """Of all that decides what the policy means: equal digests imply equal meaning."""
    digest = hashlib.sha256(words_digest.encode())
    for rule in policy.rules:
        slots = read_slots(rule.attn, policy.naming)
        meaning = (rule.match, slots, rule.also, rule.replace_mask, rule.fallback, dict(rule.tolerance), rule.untrained)
        digest.update("\n".join(_canonical(meaning)).encode())
    for name, source in sorted(policy.tables.items()):
        digest.update(f"\n{name}={source.fingerprint()}".encode())
    if policy.parameters and (folder / policy.parameters).is_file():
        digest.update((folder / policy.parameters).read_bytes())
    digest.update(policy.parameters.encode())
    return digest.hexdigest()


def _canonical(value: object) -> Iterator[str]:
    """A value as lines that do not depend on how it was written."""
    if isinstance(value, Expr):
        yield text(simplify(value))
    elif isinstance(value, IntegerSet):
        yield ", ".join(sorted({_spelled_once(part) for part in value.parts}))
    elif isinstance(value, Enum):
        yield str(value.value)
    elif isinstance(value, DerivedTable):
        yield value.name
    elif is_dataclass(value):
        value = _defaults_written_out(value) if isinstance(value, Slots) else value
        for field in fields(value):
            yield f"{type(value).__name__}.{field.name}"
            yield from _canonical(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield str(key)
            yield from _canonical(value[key])
    elif isinstance(value, tuple | list):
        yield f"{len(value)}"
        for inner in value:
            yield from _canonical(inner)
    else:
        yield repr(value)


def _spelled_once(part: slice | int) -> str:
    return str(part) if isinstance(part, int) else f"{part.start or 0}:{part.stop}:{part.step or 1}"


def _defaults_written_out(slots: Slots) -> Slots:
    """The same slots where nothing is left to a default, and groups stand in one order."""
    empty_rows = slots.empty_rows or (EmptyRows.ZERO if slots.mask else None)
    return replace(slots, empty_rows=empty_rows, heads=tuple(sorted(slots.heads, key=lambda group: [*_canonical(group[0])])))
