"""The slots of a variant as a policy sets them: an empty one is the site's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import DerivedTable, EmptyRows, Normalizer
from attn_compiler.errors import AttnError, LanguageError, PolicyError, did_you_mean
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.language import Scope, parse_call, parse_expression, parse_mask
from attn_compiler.planning.words import PerToken, Seen, Words
from attn_compiler.planning.yaml_text import Entry

# Slots that parse and that no target carries yet, with the folder of their words where they are calls.
LATER: Mapping[str, str | None] = {
    "over": None, "select": None, "feature": "features", "state": "states", "mix": None, "operands": None, "context": "contexts",
    "edit": "edits", "output": "outputs", "storage": None, "emit": None,
}  # fmt: skip
NOW = ("geometry", "order", "mask", "empty_rows", "scale", "score", "normalizer", "heads")
SLOTS = (*NOW, *LATER)
Read = TypeVar("Read")


@dataclass(frozen=True)
class Slots:
    """What a rule sets. `heads` gives sets of query heads slots of their own; None there is `exact`."""

    mask: Seen | None = None
    empty_rows: EmptyRows | None = None
    scale: Expr | None = None
    score: Expr | None = None
    normalizer: Normalizer | None = None
    geometry: Geometry | None = None
    order: PerToken | None = None
    heads: tuple[tuple[IntegerSet | None, Slots | None], ...] = ()  # a set of None: the rest
    later: Mapping[str, object] = field(default_factory=dict, hash=False)

    @property
    def derived(self) -> tuple[DerivedTable, ...]:
        """The tables that follow from a length, which these slots read."""
        return (self.mask.derived if self.mask else ()) + (self.order.derived if self.order else ())

    def unsupported(self) -> tuple[str, ...]:
        """The slots that are set and that nothing carries yet."""
        inner = [slot for _, group in self.heads if group for slot in group.unsupported()]
        return tuple(dict.fromkeys([*self.later, *inner]))

    def set_slots(self) -> frozenset[str]:
        """The names of the slots that are set, for all heads or for some."""
        own = {slot for slot in NOW if slot not in ("geometry", "order") and getattr(self, slot) not in (None, ())}
        own |= {"empty_rows"} if self.mask else set()  # a mask decides on rows that it leaves empty
        return frozenset(own | set(self.later)).union(*(group.set_slots() for _, group in self.heads if group))

    def head_groups(self, heads: int) -> Iterator[tuple[IntegerSet, Slots | None]]:
        """Each group of a site with so many heads; heads that nobody names take what stands beside `heads`."""
        beside = replace(self, heads=())
        left = set(range(heads))
        rest: Slots | None = beside
        for chosen, group in self.heads:
            if chosen is None:
                rest = group
                continue
            members = chosen.members(heads)
            if members - left:
                raise LanguageError(f"head {min(members - left)} is named twice")
            left -= members
            yield chosen, group
        if left:
            yield IntegerSet(tuple(sorted(left))), rest


@dataclass(frozen=True)
class Naming:
    """What the names of a file mean, before a site's layer and the compile-time values are known."""

    words: Words
    geometries: Mapping[str, Entry] = field(default_factory=dict)
    roles: Mapping[str, IntegerSet | str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    data: frozenset[str] = frozenset()
    variants: Mapping[str, Entry] = field(default_factory=dict)
    values: Mapping[str, int | float] = field(default_factory=dict)
    layer: int | None = None
    strict: bool = True

    def scope(self, geometry: Geometry | None, order: PerToken | None) -> Scope:
        return Scope(geometry, order, self.roles, self.labels, self.data, self.values, self.layer, self.strict)


def read_slots(entry: Entry, naming: Naming, within: tuple[str, ...] = ()) -> Slots | None:
    """Read what stands under `attn:`: a mapping of slots, or the name of a variant. None is `exact`."""
    if isinstance(entry.value, str):
        name = entry.value
        if name == "exact":
            return None
        if name in within:
            raise PolicyError(f'{entry.place}: the variant "{name}" contains itself')
        if name not in naming.variants:
            raise PolicyError(f'{entry.place}: unknown variant "{name}"{did_you_mean(name, ("exact", *naming.variants))}')
        return read_slots(naming.variants[name], naming, (*within, name))
    if not isinstance(entry.value, Mapping):
        raise PolicyError(f"{entry.place}: expected `exact`, the name of a variant or a mapping of slots, found {entry.kind}")
    check_keys(entry, SLOTS, "slot")
    given = entry.value
    geometry = _geometry(given["geometry"], naming) if "geometry" in given else None
    order = _order(given["order"], naming, naming.scope(geometry, None)) if "order" in given else None
    scope = naming.scope(geometry, order)
    slots = _read_now(Slots(geometry=geometry, order=order), given, naming.words, scope)
    later = {slot: _later(given[slot], slot, naming, scope, within) for slot in LATER if slot in given}
    slots = replace(slots, later={**slots.later, **later})
    return _with_heads(slots, given, naming, within) if "heads" in given else slots


def _read_now(slots: Slots, given: Mapping[str, Entry], words: Words, scope: Scope) -> Slots:
    """The slots that are texts of the language."""

    def number(text: str) -> Expr:
        return _real(parse_expression(text, words, scope))

    if "mask" in given:
        slots = replace(slots, mask=_located(given["mask"], lambda text: parse_mask(text, words, scope)))
    if "empty_rows" in given:
        slots = replace(slots, empty_rows=EmptyRows(_one_of(given["empty_rows"], [rule.value for rule in EmptyRows])))
    if "scale" in given:
        slots = replace(slots, scale=_located(given["scale"], number))
    if "score" in given:
        slots = replace(slots, score=_located(given["score"], number))
    if "normalizer" not in given:
        return slots
    normalizer = _located(given["normalizer"], lambda text: parse_call(text, "normalizers", words, scope))
    if isinstance(normalizer, Normalizer):
        return replace(slots, normalizer=normalizer)
    return replace(slots, later={"normalizer": normalizer})


def _order(entry: Entry, naming: Naming, scope: Scope) -> PerToken:
    order = _located(entry, lambda text: parse_call(text, "orders", naming.words, scope))
    assert isinstance(order, PerToken)
    return order


def _real(e: Expr) -> Expr:
    if e.sort is Sort.BOOL:
        raise LanguageError("expected a number, found a truth value; `where(c, 1, 0)` counts one")
    return e


def _located(entry: Entry, read: Callable[[str], Read]) -> Read:
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


def check_keys(entry: Entry, known: tuple[str, ...], what: str) -> None:
    """Refuse keys that mean nothing."""
    assert isinstance(entry.value, Mapping)
    for key, inner in entry.value.items():
        if key not in known:
            cut = entry.flow and inner.value is None  # `{mask: window(4, 2)}` is a mask and a key `2)`
            hint = "; YAML cut the expression before it at a comma: quote it" if cut else did_you_mean(key, known)
            raise PolicyError(f'{entry.keys.get(key, entry.place)}: unknown {what} "{key}"{hint}')


def _one_of(entry: Entry, known: Sequence[str]) -> str:
    if entry.value not in known:
        raise PolicyError(f"{entry.place}: expected one of {', '.join(known)}, found {entry.kind}")
    return str(entry.value)


def _geometry(entry: Entry, naming: Naming) -> Geometry:
    value = entry.value
    if isinstance(value, str) and value != "square":
        if value not in naming.geometries:
            raise PolicyError(f'{entry.place}: unknown geometry "{value}"{did_you_mean(value, naming.geometries)}')
        return read_geometry(naming.geometries[value], naming.values)
    return read_geometry(Entry({"size": entry}, entry.place), naming.values)


def read_geometry(entry: Entry, values: Mapping[str, int | float]) -> Geometry:
    """Read `{size: [64, 64], before: 512, after: 0}`."""
    if not isinstance(entry.value, Mapping) or "size" not in entry.value:
        raise PolicyError(f"{entry.place}: a geometry is written {{size: [64, 64], before: 0, after: 0}}, found {entry.kind}")
    check_keys(entry, ("size", "before", "after"), "key of a geometry")
    size = entry.value["size"].plain()
    before, after = (entry.value[key].plain() if key in entry.value else 0 for key in ("before", "after"))
    if not isinstance(size, str | list) or not (type(before) is int and type(after) is int):  # a truth value is no number
        raise PolicyError(f"{entry.place}: the size is a list of sizes or `square`, before and after are whole numbers")
    try:
        return Geometry.of(size, before, after, values)
    except LanguageError as error:
        raise PolicyError(f"{entry.place}: {error}") from error


def _later(entry: Entry, slot: str, naming: Naming, scope: Scope, within: tuple[str, ...]) -> object:
    """A slot that nothing carries yet: its words are checked, so that a policy that loads stays one that loads."""
    folder = LATER[slot]
    if folder is not None:
        entries = entry.value if isinstance(entry.value, tuple) else (entry,)
        return tuple(_located(one, lambda text: parse_call(text, folder, naming.words, scope)) for one in entries)
    if slot == "mix":
        return _mix(entry, naming, within)
    if slot == "storage":
        return _storage(entry, naming, scope)
    return entry.plain()


def _mix(entry: Entry, naming: Naming, within: tuple[str, ...]) -> object:
    if not isinstance(entry.value, Mapping):
        raise PolicyError(f"{entry.place}: expected {{how: …, branches: {{…}}}}, found {entry.kind}")
    check_keys(entry, ("how", "branches", "weights"), "key of a mix")
    if "how" not in entry.value or "branches" not in entry.value:
        raise PolicyError(f"{entry.place}: a mix needs `how` and `branches`")
    how = _one_of(entry.value["how"], ("sum", "gate", "lse", "shared_denominator", "lerp"))
    branches = entry.value["branches"]
    if not isinstance(branches.value, Mapping):
        raise PolicyError(f"{branches.place}: expected branches by name, found {branches.kind}")
    read = {name: read_slots(branch, naming, within) for name, branch in branches.value.items()}
    return how, tuple(sorted(read.items(), key=lambda item: item[0]))


STORED = ("qk", "pv", "kv_cache", "projections")


def _storage(entry: Entry, naming: Naming, scope: Scope) -> object:
    if not isinstance(entry.value, Mapping):
        raise PolicyError(f"{entry.place}: expected {{qk: int8, …}}, found {entry.kind}")
    check_keys(entry, STORED, "operand")
    found = {}
    for operand, held in entry.value.items():
        long = held.value if isinstance(held.value, Mapping) else {"type": held}
        if isinstance(held.value, Mapping):
            check_keys(held, ("type", "per", "smooth", "outliers"), "key of a storage")
        calls = {key: inner for key, inner in long.items() if key in ("type", "per")}
        parsed = {
            key: _located(one, lambda text: parse_call(text, "storages", naming.words, scope)) for key, one in calls.items()
        }
        found[operand] = (parsed, {key: inner.plain() for key, inner in long.items() if key not in calls})
    return found


def _with_heads(slots: Slots, given: Mapping[str, Entry], naming: Naming, within: tuple[str, ...]) -> Slots:
    entry = given["heads"]
    if not isinstance(entry.value, Mapping):
        raise PolicyError(f'{entry.place}: expected {{"0:4": variant, rest: variant}}, found {entry.kind}')
    groups: list[tuple[IntegerSet | None, Slots | None]] = []
    for key, inner in entry.value.items():
        place = entry.keys.get(key, entry.place)
        try:
            chosen = None if key == "rest" else IntegerSet.parse(key)
        except LanguageError as error:
            raise PolicyError(f"{place}: {error}") from error
        own = inner.value if isinstance(inner.value, Mapping) else None
        if own is None:
            named = read_slots(inner, naming, within)
            groups.append((chosen, None if named is None else _laid_over(named, slots)))
        else:
            beside = {slot: value for slot, value in given.items() if slot != "heads" and slot not in own}
            merged = Entry({**beside, **own}, inner.place, inner.keys, inner.flow)
            groups.append((chosen, read_slots(merged, naming, within)))
    if any(group is not None and group.heads for _, group in groups):
        raise PolicyError(f"{entry.place}: a group of heads has no groups of its own; name its heads beside the others")
    _check_overlap(groups, entry)
    return replace(slots, heads=tuple(groups))


def _laid_over(own: Slots, beside: Slots) -> Slots:
    """A named variant in a group: its slots win over those beside `heads`."""
    changes = {slot: getattr(beside, slot) for slot in NOW if slot != "heads" and getattr(own, slot) is None}
    return replace(own, **changes, later={**beside.later, **own.later})


def _check_overlap(groups: list[tuple[IntegerSet | None, Slots | None]], entry: Entry) -> None:
    """Find a head that is named twice as far as that shows without knowing how many heads there are."""
    seen: set[int] = set()
    for chosen, _ in groups:
        if chosen is None:
            continue
        fixed = all(
            n is None or n >= 0 for part in chosen.parts for n in ((part,) if isinstance(part, int) else (part.start, part.stop))
        )
        bounded = all(isinstance(part, int) or part.stop is not None for part in chosen.parts)
        if not (fixed and bounded):
            continue
        try:
            members = chosen.members(4096)
        except AttnError as error:
            raise PolicyError(f"{entry.place}: {error}") from error
        if members & seen:
            raise PolicyError(f"{entry.place}: head {min(members & seen)} is named twice")
        seen |= members
