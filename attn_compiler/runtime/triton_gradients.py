"""Runs the backward Triton kernels of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.runtime.gradients import Given, empty_like_tokens
from attn_compiler.runtime.kernels import Shape, spec_at
from attn_compiler.runtime.triton_launch import call, load, on_device, operand, sizes, table
from attn_compiler.runtime.triton_visits import Visits, visits_of
from attn_compiler.runtime.tuning import chosen, example
from attn_compiler.runtime.visits import visited
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.triton.blocks import Blocks, Kind
from attn_compiler.targets.triton.distance import leads
from attn_compiler.targets.triton.gradient import TILES, along_diagonals, by_key, by_query, read_by_distance

_NUMBERS = 4  # that the kernels exchange of each query


@dataclass(frozen=True, eq=False)
class Launch:
    """One of the two kernels, loaded, and what it visits."""

    kernel: Any
    blocks: Blocks
    visits: Visits


@dataclass(frozen=True, eq=False)
class Diagonals:
    """The kernel for tables that are read by distance, loaded, and by how many tiles queries may be ahead of keys."""

    kernel: Any
    size: int  # of a tile
    options: Mapping[str, int]
    leads: range


@dataclass(frozen=True, eq=False)
class Pair:
    """The two kernels for some of the heads, in the order in which they run, and the third one where it is needed."""

    members: tuple[int, ...]
    empty_rows: EmptyRows
    by_query: Launch
    by_key: Launch
    owners: tuple[Tensor, ...]  # key heads, and where the members of each start
    numbers: tuple[int, ...]  # the places of its tables among those of the call
    wanted: tuple[int, ...]  # of those that want gradients
    diagonals: Diagonals | None


@dataclass(frozen=True, eq=False)
class Results:
    """Where gradients go, and what the kernels exchange of each query."""

    of_q: Tensor
    of_k: Tensor
    of_v: Tensor
    numbers: Tensor
    sums: Sequence[Tensor | None]  # of tables


Wanted = tuple[bool, ...]  # which tables want gradients


@lru_cache(maxsize=128)
def _pairs(shape: Shape, wanted: Wanted, device: torch.device) -> tuple[Pair, ...]:
    return tuple(_pair(shape, n, wanted, device) for n in range(len(head_groups(shape.variant, shape.heads))))


def _pair(shape: Shape, group: int, wanted: Wanted, device: torch.device) -> Pair:
    names = tuple(compress(shape.names, wanted))
    attempt = partial(_attempt, shape, group, wanted, device)
    best = partial(chosen, shape=shape, group=group, device=device, wanted=names)
    cuts: dict[Kind, Blocks] = {kind: best(kind, attempt=partial(attempt, kind)) for kind in ("backward_q", "backward_kv")}
    pair = _cut(shape, group, wanted, device, cuts)
    if pair.diagonals is None:
        return pair
    _, variant = head_groups(shape.variant, shape.heads)[group]
    third = best("diagonals", attempt=partial(attempt, "diagonals"))
    return replace(pair, diagonals=_diagonals(shape, variant, pair.wanted, third))


def _diagonals(shape: Shape, variant: Variant, wanted: tuple[int, ...], blocks: Blocks) -> Diagonals:
    size, counted = blocks.queries, shape.q_counted and shape.k_counted
    firsts = (shape.first_query, shape.first_key) if counted else None
    options = {"BLOCK": size, "num_warps": blocks.warps, "num_stages": blocks.stages}
    kernel = load(along_diagonals(spec_at(shape, variant), tuple(shape.names[n] for n in wanted))).backward
    return Diagonals(kernel, size, options, leads(variant, (shape.q_len, shape.k_len), firsts, size))


def _cut(shape: Shape, group: int, wanted: Wanted, device: torch.device, cuts: Mapping[Kind, Blocks]) -> Pair:
    members, variant = head_groups(shape.variant, shape.heads)[group]
    spec = spec_at(shape, variant)
    first, second, third = (cuts.get(kind, Blocks()) for kind in _RUNS)
    numbers = tuple(shape.names.index(name) for name, _ in spec.tables)
    chosen_ones = tuple(n for n in numbers if wanted[n])
    names = tuple(shape.names[n] for n in chosen_ones)
    rows = visited(shape, members, variant, spec, (first.queries, first.keys))
    columns = visited(shape, members, variant, spec, (second.keys, second.queries), by_key=True)
    owners, starts = np.unique(np.array(members) // (shape.heads // shape.kv_heads), return_index=True)
    of_owners = on_device((owners, np.append(starts, len(members))), device)
    of_queries, of_keys = visits_of(spec, rows, first, device), visits_of(spec, columns, second, device, by_key=True)
    launches = (
        Launch(load(by_query(spec, rows.iteration, names)).backward, first, of_queries),
        Launch(load(by_key(spec, columns.iteration, names)).backward, second, of_keys),
    )
    diagonals = None
    if not columns.iteration.ordered and read_by_distance(spec, names):
        diagonals = _diagonals(shape, variant, chosen_ones, third)
    return Pair(members, variant.empty_rows, *launches, of_owners, numbers, chosen_ones, diagonals)


def gradients(shape: Shape, given: Given, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The gradients of q, k, v and of the tables that are `wanted`."""
    pairs = _pairs(shape, tuple(wanted), given.q.device)
    sums = [torch.zeros_like(t, dtype=torch.float64) if yes else None for t, yes in zip(given.tables, wanted, strict=True)]
    numbers = torch.empty((_NUMBERS, *given.kept.shape[1:]), dtype=torch.float32, device=given.q.device)
    of_q = empty_like_tokens(given.q)
    of_keys = []
    for pair in pairs:
        alone = len(pairs) == 1
        of_k, of_v = (empty_like_tokens(x) if alone else torch.zeros_like(x, dtype=torch.float32) for x in (given.k, given.v))
        results = Results(of_q, of_k, of_v, numbers, sums)
        for run in _RUNS.values():
            run(pair, shape, given, results)
        of_keys.append((of_k, of_v if pair.empty_rows is not EmptyRows.MEAN else of_v + _means(pair, shape, given)))
    of_k, of_v = (sum(parts[1:], parts[0]).to(given.k.dtype) for parts in zip(*of_keys, strict=True))
    return of_q, of_k, of_v, [x if x is None else x.to(t.dtype) for x, t in zip(sums, given.tables, strict=True)]


def _run_by_query(pair: Pair, shape: Shape, given: Given, results: Results) -> None:
    one = pair.by_query
    grid = -(-shape.q_len // one.blocks.queries), len(pair.members), shape.batch
    operands = map(operand, (given.q, given.k, given.v, given.out, given.above, results.of_q))
    read, rest = _rest(pair, shape, given, results)
    visits = one.visits.of_call(given.q, read, sizes(shape))
    arguments = (*operands, given.of_totals, given.kept, results.numbers, visits, read, *rest)
    call(given.q, one.kernel, grid, arguments, one.blocks.options())


def _run_by_key(pair: Pair, shape: Shape, given: Given, results: Results) -> None:
    one = pair.by_key
    grid = -(-shape.k_len // one.blocks.keys), len(pair.owners[0]), shape.batch
    operands = map(operand, (given.q, given.k, given.v, given.above, results.of_k, results.of_v))
    read, rest = _rest(pair, shape, given, results)
    unseeing = results.numbers[3].amax(-1)  # whether some query of a head saw no key, where that matters
    visits = (*one.visits.of_call(given.q, read, sizes(shape)), *pair.owners, unseeing)
    call(given.q, one.kernel, grid, (*operands, results.numbers, visits, read, *rest), one.blocks.options())


def _run_along(pair: Pair, shape: Shape, given: Given, results: Results) -> None:
    one = pair.diagonals
    if one is None or not one.leads:
        return
    pieces = -(-shape.q_len // (one.size * TILES))
    grid = len(one.leads) * pieces, len(pair.members), shape.batch
    operands = map(operand, (given.q, given.k, given.v, given.above))
    members = pair.by_query.visits.arrays["members"]
    read, rest = _rest(pair, shape, given, results)
    call(given.q, one.kernel, grid, (*operands, results.numbers, members, read, *rest, one.leads[0]), one.options)


def _rest(pair: Pair, shape: Shape, given: Given, results: Results) -> tuple[object, tuple[object, ...]]:
    """The tables that are read; those that are added to, and the sizes."""
    read = tuple(table(given.tables[n]) for n in pair.numbers)
    added = tuple(table(x) for x in (results.sums[n] for n in pair.wanted) if x is not None)
    return read, (added, *sizes(shape))


_RUNS: Mapping[Kind, Callable[[Pair, Shape, Given, Results], None]] = {
    "backward_q": _run_by_query,
    "backward_kv": _run_by_key,
    "diagonals": _run_along,
}


def _attempt(shape: Shape, group: int, wanted: Wanted, device: torch.device, kind: Kind, blocks: Blocks) -> Callable[[], None]:
    """Launch one of the kernels, cut so, on numbers of its own."""
    shape = replace(shape, batch=1)
    q, k, v, out, tables = example(shape, device)
    numbers = torch.zeros((_NUMBERS, *q.shape[:3]), device=device)
    given = Given(q, k, v, tables, out, numbers[:2], torch.randn_like(out))
    sums = [torch.zeros_like(t, dtype=torch.float64) if yes else None for t, yes in zip(tables, wanted, strict=True)]
    results = Results(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), numbers.clone(), sums)
    return partial(_RUNS[kind], _cut(shape, group, wanted, device, {kind: blocks}), shape, given, results)


def _means(pair: Pair, shape: Shape, given: Given) -> Tensor:
    """What queries that see no key add to every row of v."""
    unseeing = given.kept[0] == float("-inf")
    members = pair.by_query.visits.arrays["members"]  # on the device already: a list of numbers would have the host wait
    mine = torch.zeros(shape.heads, dtype=torch.bool, device=unseeing.device).index_fill_(0, members.long(), True)
    above = torch.where((unseeing & mine[:, None])[..., None], given.above.float(), 0.0).sum(2, keepdim=True)
    return above.reshape(shape.batch, shape.kv_heads, -1, 1, shape.value_dim).sum(2) / shape.k_len
