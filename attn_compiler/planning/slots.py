"""The slots of a variant as a policy sets them: an empty one is the site's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from attn_compiler.algebra.context import Context, Merge
from attn_compiler.algebra.expr import Expr, Sort, every
from attn_compiler.algebra.feature import Feature
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.output import Local, Step
from attn_compiler.algebra.storage import Storage
from attn_compiler.algebra.variant import Delta, DerivedTable, EmptyRows, Gates, Normalizer
from attn_compiler.errors import AttnError, LanguageError, PolicyError, did_you_mean
from attn_compiler.planning.entries import check_keys, each, located, one_of
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.language import Scope, parse_call, parse_expression, parse_mask
from attn_compiler.planning.later import SLOTS_LATER, Later
from attn_compiler.planning.mixes import MixSlots, read_mix
from attn_compiler.planning.operand_names import read_operands
from attn_compiler.planning.storing import read_storage
from attn_compiler.planning.words import Declared, PerToken, Seen, Words
from attn_compiler.planning.yaml_text import Entry

NOW = (
    "geometry", "order", "mask", "empty_rows", "scale", "score", "normalizer", "feature", "state", "storage", "output",
    "context", "operands",
    "heads", "mix",
)  # fmt: skip
SLOTS = (*NOW, *SLOTS_LATER)


@dataclass(frozen=True)
class Slots:
    """What a rule sets. `heads` gives sets of query heads slots of their own; None there is `exact`."""

    mask: Seen | None = None
    empty_rows: EmptyRows | None = None
    scale: Expr | None = None
    score: Expr | None = None
    normalizer: Normalizer | None = None
    feature: Feature | None = None
    state: Expr | Delta | Gates | None = None  # what the score of a pair is multiplied with
    mix: MixSlots | None = None
    geometry: Geometry | None = None
    order: PerToken | None = None
    storage: Storage | None = None
    output: tuple[Step, ...] | None = None
    context: tuple[Context | Merge, ...] | None = None
    kept: Expr | None = None  # which keys a context leaves, where it drops some
    operands: Mapping[str, str] | None = field(default=None, hash=False)
    heads: tuple[tuple[IntegerSet | None, Slots | None], ...] = ()  # a set of None: the rest
    later: Mapping[str, object] = field(default_factory=dict, hash=False)

    @property
    def derived(self) -> tuple[DerivedTable, ...]:
        """The tables that follow from a length, which these slots read."""
        own = (self.mask.derived if self.mask else ()) + (self.order.derived if self.order else ())
        return own + tuple(table for branch in self.branches() for table in branch.derived)

    def unsupported(self) -> tuple[str, ...]:
        """The slots that are set and that nothing carries yet."""
        groups = [group for _, group in self.heads if group]
        inner = [slot for group in (*groups, *self.branches()) for slot in group.unsupported()]
        return tuple(dict.fromkeys([*self.later, *inner]))

    def branches(self) -> tuple[Slots, ...]:
        """What the branches of a mix set."""
        return () if self.mix is None else tuple(slots for _, slots in self.mix.branches if slots is not None)

    def set_slots(self) -> frozenset[str]:
        """The names of the slots that are set, for all heads or for some."""
        own = {slot for slot in NOW if slot not in ("geometry", "order") and getattr(self, slot) not in (None, ())}
        own |= {"context"} if self.kept is not None else set()
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
            if not members:
                raise LanguageError(f"heads {chosen}: the site has {heads}, none of them is among these")
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
    if "storage" in given:
        slots = replace(slots, storage=read_storage(given["storage"], naming.words, scope))
    if "output" in given:
        slots = _with_outputs(slots, given["output"], naming.words, scope)
    if "context" in given:
        slots = _with_contexts(slots, given["context"], naming.words, scope)
    if "operands" in given:
        slots = replace(slots, operands=read_operands(given["operands"]))
    later = {slot: Later(naming.words, scope).read(slot, given[slot]) for slot in SLOTS_LATER if slot in given}
    if later.get("over") == "tokens":  # what every site does
        del later["over"]
    slots = replace(slots, later={**slots.later, **later})
    if "mix" in given:
        number = _number_in(naming.words, scope)
        slots = replace(
            slots,
            mix=read_mix(
                given["mix"],
                lambda one: _inner(one, given, ("mix", "heads", "output"), replace(slots, output=None), naming, within),
                number,
            ),
        )
    return _with_heads(slots, given, naming, within) if "heads" in given else slots


def _read_now(slots: Slots, given: Mapping[str, Entry], words: Words, scope: Scope) -> Slots:
    """The slots that are texts of the language."""
    number = _number_in(words, scope)
    if "mask" in given:
        slots = replace(slots, mask=located(given["mask"], lambda text: parse_mask(text, words, scope)))
    if "empty_rows" in given:
        slots = replace(
            slots,
            empty_rows=EmptyRows(one_of(given["empty_rows"], [rule.value for rule in EmptyRows if rule is not EmptyRows.NAN])),
        )
    if "scale" in given:
        slots = replace(slots, scale=located(given["scale"], number))
    if "score" in given:
        slots = replace(slots, score=located(given["score"], number))
    for slot, folder in (("normalizer", "normalizers"), ("feature", "features"), ("state", "states")):
        if slot in given:
            found = located(given[slot], lambda text, folder=folder: parse_call(text, folder, words, scope))  # type: ignore[misc]
            slots = _with_word(slots, slot, found)
    if slots.normalizer is None and ("feature" in given or "state" in given):
        said = "linear(none)" if isinstance(slots.state, Delta) else "linear"
        slots = _with_word(slots, "normalizer", parse_call(said, "normalizers", words, scope))
    return slots


def _with_word(slots: Slots, slot: str, found: object) -> Slots:
    """A slot that is a word, among those that nothing carries yet where the word is only declared."""
    if isinstance(found, Declared):
        return replace(slots, later={**slots.later, slot: found})
    return replace(slots, **{slot: found})  # type: ignore[arg-type]


def _with_outputs(slots: Slots, entry: Entry, words: Words, scope: Scope) -> Slots:
    """The steps that are taken with a result, one after the other."""
    found = [located(one, lambda text: parse_call(text, "outputs", words, scope)) for one in each(entry)]
    return replace(slots, output=tuple(step for step in found if isinstance(step, Expr | Local)))


def _with_contexts(slots: Slots, entry: Entry, words: Words, scope: Scope) -> Slots:
    """What becomes of keys and values, one after the other."""
    found = [located(one, lambda text: parse_call(text, "contexts", words, scope)) for one in each(entry)]
    kept = [one for one in found if isinstance(one, Expr)]
    known = tuple(one for one in found if isinstance(one, Context | Merge))
    return replace(slots, context=known, kept=every(*kept) if kept else None)


def _number_in(words: Words, scope: Scope) -> Callable[[str], Expr]:
    return lambda text: _real(parse_expression(text, words, scope))


def _order(entry: Entry, naming: Naming, scope: Scope) -> PerToken:
    order = located(entry, lambda text: parse_call(text, "orders", naming.words, scope))
    assert isinstance(order, PerToken)
    return order


def _real(e: Expr) -> Expr:
    if e.sort is Sort.BOOL:
        raise LanguageError("expected a number, found a truth value; `where(c, 1, 0)` counts one")
    return e


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
        groups.append((chosen, _inner(inner, given, ("heads",), slots, naming, within)))
    if any(group is not None and group.heads for _, group in groups):
        raise PolicyError(f"{entry.place}: a group of heads has no groups of its own; name its heads beside the others")
    _check_overlap(groups, entry)
    return replace(slots, heads=tuple(groups))


def _inner(
    entry: Entry, given: Mapping[str, Entry], outer: tuple[str, ...], slots: Slots, naming: Naming, within: tuple[str, ...]
) -> Slots | None:
    """A group of heads or a branch: what stands beside them holds for it too, its own slots win."""
    if not isinstance(entry.value, Mapping):
        named = read_slots(entry, naming, within)
        return None if named is None else _laid_over(named, slots)
    beside = {slot: value for slot, value in given.items() if slot not in outer and slot not in entry.value}
    return read_slots(Entry({**beside, **entry.value}, entry.place, entry.keys, entry.flow), naming, within)


def _laid_over(own: Slots, beside: Slots) -> Slots:
    """A named variant in a group or a branch: its slots win over those beside it."""
    changes = {slot: getattr(beside, slot) for slot in NOW if slot != "heads" and getattr(own, slot) is None}
    if own.context is None:
        changes["kept"] = beside.kept
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
