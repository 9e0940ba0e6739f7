"""Runs generated Triton kernels: what they visit is worked out once for all calls of the same shape, and kept on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.storage import PLAIN, Storage
from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.kernels import Shape, places_of, spec_at
from attn_compiler.runtime.triton_coding import Operands, coded
from attn_compiler.runtime.triton_launch import call, can_be_described, load, operand, sizes, table
from attn_compiler.runtime.triton_visits import Visits, visits_of
from attn_compiler.runtime.tuning import chosen, example
from attn_compiler.runtime.visits import Visited, visited
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.targets.triton.coded import tables as tables_of_codes
from attn_compiler.targets.triton.coded import with_scales
from attn_compiler.targets.triton.source import source


@dataclass(frozen=True, eq=False)
class Kernel:
    """The kernel of some of the heads, and what it visits."""

    members: tuple[int, ...]
    variant: Variant
    spec: Spec
    text: str
    visited: Visited


def kernel(shape: Shape, group: int, blocks: Blocks) -> Kernel:
    """The kernel of one of a call's groups of heads."""
    members, variant = head_groups(shape.variant, shape.heads)[group]
    spec = with_scales(spec_at(shape, variant))
    found = visited(shape, members, variant, spec, (blocks.queries, blocks.keys))
    return Kernel(members, variant, spec, source(spec, replace(found.iteration, specialized=blocks.specialized)), found)


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel, loaded, with what it visits on the device."""

    members: tuple[int, ...]
    kernel: Any
    blocks: Blocks
    visits: Visits
    numbers: tuple[int, ...]  # the places of its tables among those of the call, and behind them the scales
    scales: tuple[str, ...]
    storage: Storage
    order: Expr | None  # of the tokens that share scales


@lru_cache(maxsize=128)
def launches(shape: Shape, device: torch.device, describable: bool) -> tuple[Launch, ...]:
    """The launches of a call, its groups of heads one after the other.

    `describable` is whether its operands can be copied tile by tile: nothing else of them is asked.
    """
    groups = range(len(head_groups(shape.variant, shape.heads)))
    attempts = (partial(_attempt, shape, n, device) for n in groups)
    cuts = (chosen("forward", shape, n, device, attempt, describable=describable) for n, attempt in enumerate(attempts))
    return tuple(_launch(shape, n, blocks, device) for n, blocks in zip(groups, cuts, strict=True))


def _launch(shape: Shape, group: int, blocks: Blocks, device: torch.device) -> Launch:
    one = kernel(shape, group, blocks)
    scales = tables_of_codes(one.spec.variant)
    names = (*shape.names, *scales)
    numbers, visits = tuple(names.index(name) for name, _ in one.spec.tables), visits_of(one.spec, one.visited, blocks, device)
    return Launch(one.members, load(one.text).forward, blocks, visits, numbers, scales, one.variant.storage, one.variant.order)


def _attempt(shape: Shape, group: int, device: torch.device, blocks: Blocks) -> Callable[[], None]:
    """Launch a kernel on numbers of its own."""
    shape = replace(shape, batch=1)
    q, k, v, out, tables = example(shape, device)
    one = _launch(shape, group, blocks, device)
    operands, read = _coded(one, shape, (q, k, v), tables)
    return lambda: _start(one, shape, (*operands, out), (None, None), read)


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
    """Fill `out` and `totals`: the log-sum-exp of each query (`kept` is 0), its peak and its mass (1), or all of them (2)."""
    results = (totals, None) if totals is None or not kept else (None, totals) if kept == 1 else (totals[0], totals[1:])
    for one in launches(shape, q.device, all(map(can_be_described, (q, k, v, out)))):
        operands, read = _coded(one, shape, (q, k, v), tables)
        _start(one, shape, (*operands, out), results, read)


def _coded(one: Launch, shape: Shape, operands: Operands, tables: Sequence[Tensor]) -> tuple[Operands, Sequence[Tensor]]:
    """The operands as a kernel reads them, and all tables."""
    if one.storage == PLAIN:
        return operands, tables
    operands, found = coded(*operands, one.storage, places_of(shape, operands, tables, one.order))
    return operands, [*tables, *(found[name] for name in one.scales)]


def _start(
    one: Launch, shape: Shape, operands: Sequence[Tensor], kept: tuple[Tensor | None, Tensor | None], tables: Sequence[Tensor]
) -> None:
    grid = -(-shape.q_len // one.blocks.queries), len(one.members), shape.batch
    read = tuple(table(tables[n]) for n in one.numbers)
    visits = one.visits.of_call(operands[0], read, sizes(shape))
    arguments = (*map(operand, operands), *kept, visits, read, *sizes(shape))
    call(operands[0], one.kernel, grid, arguments, one.blocks.options())
