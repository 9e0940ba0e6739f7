"""One attention of a program that is to be exported: what its operator says, and all that determines what it becomes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from attn_compiler.algebra import expr as e
from attn_compiler.algebra import wire
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import Variant, reads
from attn_compiler.planning.site import Length
from attn_compiler.targets.operands import PLACE
from attn_compiler.targets.reach import shows_itself

FIRST_QUERY, Q_POSITIONS = "attn.first_query", "attn.q_positions"
UNROTATED = ("attn.q_unrotated", "attn.k_unrotated")  # q and k before the rotary embedding, for parts that work on these
SCALES = ("attn.key_scale", "attn.value_scale")  # of a cache in codes: [1, kv heads, 1, channels]


@dataclass(frozen=True)
class Stored:
    """A table as the function reads it; sizes that change from call to call have names."""

    name: str
    dtype: str
    shape: tuple[Length, ...]


@dataclass(frozen=True)
class Call:
    """What the graph says of one exported attention besides its operands: q, k, v and `tables`, in this order."""

    name: str
    variant: Variant
    tables: tuple[str, ...]
    first: int | None  # the first query's position where it is a number; None: the last query meets the last key
    layer: int
    layers: int
    held: tuple[int, int] | None = None  # with a cache: the first and the latest keys that the next call is given
    remembers: bool = False  # whether a state takes the place of the past: that of a linear attention
    codes: int = 0  # the bits of what a cache holds in the place of numbers, which its SCALES bring back

    def write(self) -> str:
        """The call as text."""
        stands = [self.first, self.layer, self.layers]
        what = [self.name, wire.write(self.variant), self.tables, *stands, self.held, self.remembers, self.codes]
        return json.dumps(what)

    @staticmethod
    def read(text: str) -> Call:
        """The call that was written."""
        name, variant, tables, first, layer, layers, held, *how = json.loads(text)
        return Call(name, wire.read(variant), tuple(tables), first, layer, layers, held and (held[0], held[1]), *how)

    @property
    def operands(self) -> int:
        """How many tensors stand before the tables: q, k, v and the past, keys and values or the two parts of a state."""
        return 5 if self.held or self.remembers else 3

    @property
    def along_keys(self) -> frozenset[str]:
        """The tables with a number for each key, whose last axis is as long as the text: what a cache lets go of, they do not."""
        return frozenset(str(node.value) for node in reads(self.variant) if node.args[-1:] == (e.k,))

    @property
    def ends_together(self) -> bool:
        """Whether the last query is known to meet the last key."""
        return self.first is None and not {Q_POSITIONS, FIRST_QUERY} & {*self.tables}

    @property
    def position(self) -> Expr:
        """The position of query `i`."""
        if Q_POSITIONS in self.tables:
            return e.table(Q_POSITIONS, e.b, e.h, e.i)
        if FIRST_QUERY in self.tables:
            return e.i + e.table(FIRST_QUERY)
        return e.i + (e.k_len - e.q_len if self.first is None else self.first)


@dataclass(frozen=True)
class Spec:
    """One function: a call, and the sizes and types of its operands; sizes that change from call to call have names."""

    call: Call
    stored: tuple[Stored, ...]
    batch: Length
    heads: int
    kv_heads: int
    q_len: Length
    k_len: Length
    dim: int
    value_dim: int
    dtype: str

    @property
    def position(self) -> Expr:
        """The position of query `i`, with what is known of the lengths."""
        same = {e.k_len: e.q_len} if self.q_len == self.k_len else {}
        return simplify(self.call.position.substitute({**same, **self.sizes}))

    @property
    def first(self) -> Expr | None:
        """The position of the first query; None where the others do not follow it."""
        first = simplify(self.position - e.i)
        return None if first.mentions(e.i) or first.mentions(e.b, e.h) else first

    @property
    def sizes(self) -> dict[Expr, Expr]:
        """The sizes that are numbers."""
        call = self.call
        known = {e.heads: self.heads, e.dim: self.dim, e.layer: call.layer, e.layers: call.layers}
        lengths = {e.q_len: self.q_len, e.k_len: self.k_len}
        return {leaf: e.const(n) for leaf, n in (known | lengths).items() if isinstance(n, int)}

    def in_places(self, variant: Variant) -> Variant:
        """The variant with positions spelled out over `i` and PLACE."""
        spelled = {e.q: self.position, e.k: PLACE, **self.sizes}
        own = replace(variant, groups=(), derived=(), dropout=0.0)
        return own.map(lambda expression: expression.substitute(spelled))

    def always_sees(self, variant: Variant) -> bool:
        """Whether no row can be empty."""
        if variant.mask.value is True:
            return True
        among_keys = self.call.held is not None or (self.position == e.i and self.q_len == self.k_len)
        return among_keys and shows_itself(variant.mask)

    def in_positions(self, mask: Expr) -> Expr:
        """A mask over positions alone, where these are what counts queries."""
        counted = {e.i: e.q} if self.position == e.i else {}
        return mask.substitute({**self.sizes, **counted})

    def table(self, name: str) -> Stored:
        return next(stored for stored in self.stored if stored.name == name)


def length(size: object) -> Length:
    """A size of a traced tensor: a number, or the name of one that changes."""
    return size if isinstance(size, int) else str(size)


def sort_of(dtype: str) -> Sort:
    """What the numbers of a table stand for."""
    return Sort.BOOL if dtype == "bool" else Sort.REAL if "float" in dtype else Sort.INDEX


def shape_of(sizes: Sequence[object]) -> tuple[Length, ...]:
    """The shape of a traced tensor."""
    return tuple(length(size) for size in sizes)
