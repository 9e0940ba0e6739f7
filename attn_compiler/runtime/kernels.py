"""Which kernels one call needs, and what each of them visits: worked out once for all calls of the same shape."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import CDLL
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, const
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.storage import PLAIN, Storage
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.layout import arrangements
from attn_compiler.planning.runs import Integers, Runs
from attn_compiler.planning.schedule import visits
from attn_compiler.planning.table_values import TableValues
from attn_compiler.runtime.coding import coded
from attn_compiler.runtime.compiler import call, load, why_not
from attn_compiler.runtime.machine import fastest
from attn_compiler.targets.cpp.coded import is_bfloat16, rows_of
from attn_compiler.targets.cpp.coded import tables as tables_of_codes
from attn_compiler.targets.cpp.source import source
from attn_compiler.targets.cpp.spec import (
    FIRST_KEY,
    FIRST_QUERY,
    K_POSITIONS,
    Q_POSITIONS,
    Spec,
    Stored,
    Unit,
    in_places,
    spec_of,
)
from attn_compiler.targets.operands import PLACE, Operands, head_groups
from attn_compiler.targets.rounded import AS_THEY_COME, Places, sorted_tokens
from attn_compiler.targets.rows import without_cache

COARSE = 8  # keys that a schedule speaks of together, where they are many or where tables say who sees them
LONG = 1 << 15  # keys that are many
READABLE = 1 << 16  # numbers in a table up to which it is looked at, to sharpen a schedule
WORTH_THREADS = 1 << 19  # multiplications below which starting threads costs more than they save


@dataclass(frozen=True)
class Contents:
    """What stands in a table: equal to that of another one with the same numbers."""

    numbers: bytes
    dtype: str
    shape: tuple[int, ...]

    def values(self) -> TableValues:
        return TableValues(np.frombuffer(self.numbers, self.dtype).reshape(self.shape))


@dataclass(frozen=True)
class Shape:
    """What all calls with one set of kernels and schedules have in common."""

    variant: Variant
    names: tuple[str, ...]  # of the tables
    stored: tuple[Stored, ...]
    q_counted: bool
    k_counted: bool
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    value_dim: int
    dtype: str
    layer: int
    layers: int
    first_query: int
    first_key: int
    contents: tuple[Contents | None, ...]  # of the tables, where a mask reads them

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, one.name) for one in fields(self)))

    def __hash__(self) -> int:  # asked for by every call
        return self._hash

    def sizes(self) -> list[int]:
        """The numbers of a call, in the order of the kernel's structure."""
        sizes = [self.batch, self.heads, self.kv_heads, self.q_len, self.k_len, self.layer, self.layers]
        return [*sizes, self.first_query, self.first_key]


@dataclass(frozen=True, eq=False)
class Visits:
    """The runs of rows that each vector of lanes meets, for all schedules of a launch, as a kernel reads them.

    `schedule_of` says which schedule each head follows, row by row of the batch.
    """

    lane_order: NDArray[np.int32] | None
    row_order: NDArray[np.int32] | None
    head_numbers: NDArray[np.int32]
    schedule_of: NDArray[np.int32]
    vectors: int
    offsets: Integers
    start: NDArray[np.int32]
    stop: NDArray[np.int32]
    full: NDArray[np.bool_]

    def words(self) -> list[int]:
        """The fields in the order of the kernel's structure."""
        orders = [0 if x is None else x.ctypes.data for x in (self.lane_order, self.row_order)]
        arrays = (self.head_numbers, self.schedule_of, self.offsets, self.start, self.stop, self.full)
        head_numbers, schedule_of, *runs = (x.ctypes.data for x in arrays)
        return [*orders, len(self.head_numbers), head_numbers, schedule_of, self.vectors, *runs]

    @property
    def pairs(self) -> int:
        return int((self.stop - self.start).sum())


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel for some of the heads."""

    run: Callable[[int], object]
    visits: Visits
    numbers: tuple[int, ...]  # the places of its tables among those of the call
    words: tuple[int, ...]
    parallel: int
    storage: Storage = PLAIN
    order: Expr | None = None  # of the tokens that share scales


@lru_cache(maxsize=128)
def launches(shape: Shape) -> tuple[Launch, ...]:
    """The launches of a call, its groups of heads one after the other."""
    groups = ((members, variant, _forward(shape, variant)) for members, variant in head_groups(shape.variant, shape.heads))
    return tuple(
        replace(launch(shape, members, spec, load(source(spec)), "forward", variant.mask), order=variant.order)
        for members, variant, spec in groups
    )


def sources(shape: Shape) -> tuple[tuple[tuple[int, ...], str], ...]:
    """The sources of a call's kernels, and the heads that each is for."""
    return tuple((members, source(_forward(shape, variant))) for members, variant in head_groups(shape.variant, shape.heads))


def _forward(shape: Shape, variant: Variant) -> Spec:
    pv = variant.storage.pv
    unit = unit_for("bfloat16" if pv and is_bfloat16(pv) else shape.dtype, codes=variant.storage != PLAIN)
    return spec_at(shape, variant, unit)


def spec_at(shape: Shape, variant: Variant, unit: Unit = Unit.FLOATS) -> Spec:
    """The kernel of a variant without groups."""
    tables = dict(zip(shape.names, shape.stored, strict=True))
    variant = replace(variant, order=None)  # which only those ask who make codes
    known = variant.map(lambda x: simplify(x.substitute({e.heads: const(shape.heads)})) if x.mentions(e.heads) else x)
    placed = in_places(known, q_counted=shape.q_counted, k_counted=shape.k_counted)
    return spec_of(placed, shape.dim, shape.value_dim, shape.dtype, tables, unit)


def spec_of_few(shape: Shape, variant: Variant) -> Spec:
    """The same for few queries; where a cache holds what it reads, of rows of codes."""
    held = variant.storage.kv_cache
    return spec_at(shape, variant) if held is None else replace(spec_at(shape, without_cache(variant)), rows=rows_of(held))


def launch(
    shape: Shape, members: Sequence[int], spec: Spec, library: CDLL, entry: str, mask: Expr, *, by_key: bool = False
) -> Launch:
    """A kernel with what it visits. `mask` is that of `spec`, in positions."""
    library.lanes.restype = _word
    lanes = int(library.lanes())
    visited = _visits(shape, members, mask, spec.variant.mask, lanes, by_key=by_key)
    names = (*shape.names, *tables_of_codes(spec.variant))
    numbers = tuple(names.index(name) for name, _ in spec.tables)
    work = visited.pairs * lanes * shape.batch * len(members) * (shape.dim + shape.value_dim)
    run = library[entry]
    run.argtypes = [_pointer]
    return Launch(run, visited, numbers, tuple(visited.words()), int(work >= WORTH_THREADS), spec.variant.storage)


def unit_for(dtype: str, *, codes: bool = False) -> Unit:
    """What multiplies numbers of a type; some of the operands may be codes, which tiles do not hold."""
    if dtype != "bfloat16" or why_not():
        return Unit.FLOATS
    return fastest((Unit.FLOATS, Unit.PAIRS) if codes else tuple(Unit))


def _visits(shape: Shape, members: Sequence[int], in_positions: Expr, mask: Expr, lanes: int, *, by_key: bool) -> Visits:
    """The schedule that visits the fewest pairs among the orders that suit the mask.

    With `by_key`, lanes hold keys and rows hold queries: the same mask with the roles exchanged.
    """
    tables = {name: x.values() for name, x in zip(shape.names, shape.contents, strict=True) if x and name in mask.tables()}
    masks = list(masks_of(shape, members, mask, per_row=bool(tables)))
    across, along = shape.q_len, shape.k_len
    if by_key:
        across, along = along, across
        exchanged = {one: one.substitute({e.i: e.k, e.k: e.i}) for one in dict.fromkeys(masks)}
        masks = [exchanged[one] for one in masks]
        in_positions = in_positions.substitute({e.q: e.k, e.k: e.q})
    step = COARSE if tables or along >= LONG else 1
    best = None
    for lane_order, row_order in arrangements(in_positions, across, along, lanes):
        runs: dict[Expr, Runs] = {}
        for one in masks:
            if one not in runs:
                runs[one] = visits(one, across, along, (lanes, step), e.i, lane_order, row_order, tables)
        found = _joined(members, masks, runs, (along, step), lane_order, row_order)
        best = found if best is None or found.pairs < best.pairs else best
    assert best is not None
    return best


def masks_of(shape: Shape, members: Sequence[int], mask: Expr, *, per_row: bool) -> Iterator[Expr]:
    """The mask of each head in each row of the batch, as it says itself or, without `per_row`, as it may be in any row."""
    sizes = {e.heads: shape.heads, e.q_len: shape.q_len, e.k_len: shape.k_len, e.layer: shape.layer, e.layers: shape.layers}
    known = {leaf: const(n) for leaf, n in sizes.items()} | {e.dim: const(shape.dim), PLACE: e.k}
    known |= {FIRST_QUERY: const(shape.first_query), FIRST_KEY: const(shape.first_key)}
    mask = mask.substitute(known)
    ratio = shape.heads // shape.kv_heads
    speaks_of = [leaf for leaf in (e.b, e.h, e.kv) if mask.mentions(leaf)]
    found: dict[tuple[Expr, ...], Expr] = {}
    for row in range(shape.batch):
        for head in members:
            place = {e.b: const(row) if per_row else _ANY_ROW, e.h: const(head), e.kv: const(head // ratio)}
            key = tuple(place[leaf] for leaf in speaks_of)
            if key not in found:
                found[key] = mask.substitute(place)
            yield found[key]


_ANY_ROW = e.table("any row")
_word, _pointer = ctypes.c_int64, ctypes.c_void_p


def _joined(
    members: Sequence[int],
    masks: Sequence[Expr],
    runs: dict[Expr, Runs],
    rows: tuple[int, int],  # how many there are, and how many a schedule counts as one
    lane_order: Integers | None,
    row_order: Integers | None,
) -> Visits:
    length, step = rows
    order, parts = list(runs), list(runs.values())
    before = np.cumsum([0] + [len(part.start) for part in parts])
    return Visits(
        None if lane_order is None else lane_order.astype(np.int32),
        None if row_order is None else row_order.astype(np.int32),
        np.array(members, np.int32),
        np.array([order.index(mask) for mask in masks], np.int32),
        parts[0].rows,
        np.concatenate([part.offsets + n for part, n in zip(parts, before, strict=False)]).astype(np.int64),
        np.concatenate([part.start * step for part in parts]).astype(np.int32),
        np.minimum(np.concatenate([part.stop * step for part in parts]), length).astype(np.int32),
        np.concatenate([part.full for part in parts]),
    )


def run(
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    totals: Tensor | None,
    tables: Sequence[Tensor],
    *,
    kept: int,
) -> None:
    """Fill `out` and `totals`: the log-sum-exp of each query (`kept` is 0), what gradients need of it (1), or both (2)."""
    given = [table_words(table) for table in tables]
    for one in launches(shape):
        held = coded(q, k, v, one.storage, places_of(shape, (q, k, v), tables, one.order))
        read = [*given, *(table_words(table) for _, table in held.tables)]
        of_tables = [x for n in one.numbers for x in read[n]]
        operands = (held.q, held.k, held.v, out)
        pointers = [0 if x is None else x.data_ptr() for x in (*operands, held.value_scale, totals)]
        strides = [stride for x in operands for stride in x.stride()[:3]]
        call(one.run, [*pointers, kept, *strides, one.parallel, *one.words, *shape.sizes(), *of_tables])


def places_of(shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], tables: Sequence[Tensor], order: Expr | None) -> Places:
    """Where the queries and the keys of a call stand that share scales, one block after the other."""
    if order is None:
        return AS_THEY_COME
    read, heads = dict(zip(shape.names, tables, strict=True)), shape.heads
    at = (read.get(Q_POSITIONS, shape.first_query), read.get(K_POSITIONS, shape.first_key))
    operands = Operands(*qkv, read, *at, tuple(range(heads)), heads, shape.kv_heads, shape.layer, shape.layers)
    return sorted_tokens(operands, order)


def decisive(variant: Variant) -> frozenset[str]:
    """The tables whose contents decide who sees whom."""
    return frozenset().union(*(part.mask.tables() for part in variant.parts())) | {Q_POSITIONS, K_POSITIONS}


def contents_of(table: Tensor) -> Contents | None:
    """What stands in a table, unless it is too large to look at."""
    if table.device.type != "cpu" or table.numel() > READABLE or table.dtype.is_floating_point:
        return None
    array = table.detach().numpy()
    return Contents(array.tobytes(), array.dtype.str, array.shape)


def table_words(table: Tensor) -> list[int]:
    """The fields of a table."""
    rest = (0,) * (4 - table.ndim)
    return [table.data_ptr(), *table.shape, *rest, *table.stride(), *rest]
