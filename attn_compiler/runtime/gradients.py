"""Runs the backward kernels of one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.compiler import call, load
from attn_compiler.runtime.kernels import Launch, Shape, launch, spec_at, table_words, unit_for
from attn_compiler.targets.cpp.gradient import by_key, by_query, is_owned
from attn_compiler.targets.cpp.spec import Unit
from attn_compiler.targets.operands import head_groups

_NUMBERS = 4  # that the kernels exchange of each query


@dataclass(frozen=True, eq=False)
class Given:
    """What the backward pass starts from: the forward pass's operands and results, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: Sequence[Tensor]
    out: Tensor
    kept: Tensor
    above: Tensor
    of_totals: Tensor | None = None  # the gradient of the log-sum-exp


def gradients(shape: Shape, given: Given, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The gradients of q, k, v and of the tables that are `wanted`."""
    sizes = tuple(tuple(table.shape) if yes else None for table, yes in zip(given.tables, wanted, strict=True))
    pairs = launches(shape, sizes)
    of_q, of_k, of_v = (empty_like_tokens(x) for x in (given.q, given.k, given.v))
    adds = len(pairs) > 1
    sum_k, sum_v = (torch.zeros_like(x, dtype=torch.float32) for x in (of_k, of_v)) if adds else (of_k, of_v)
    sums = [torch.zeros(t.shape, dtype=torch.float64) if yes else None for t, yes in zip(given.tables, wanted, strict=True)]
    numbers = torch.empty((_NUMBERS, *given.kept.shape[1:]), dtype=torch.float32)
    operands = [word for x in (given.q, given.k, given.v, given.out, given.above) for word in _words(x)]
    results = [word for x in (of_q, sum_k, sum_v) for word in _words(x)]
    of_totals = 0 if given.of_totals is None else given.of_totals.data_ptr()
    tables = [table_words(table) for table in given.tables]
    of_tables = [_NOWHERE if one is None else table_words(one) for one in sums]
    for pair in pairs:
        for one in pair.launches:
            read, added = ([word for n in one.numbers for word in words[n]] for words in (tables, of_tables))
            rest = [] if one.numbers else _NOWHERE  # a kernel without tables has room for one
            shared = [int(one.parallel and n not in pair.owned) for n in one.numbers]
            exchange = [given.kept.data_ptr(), of_totals, numbers.data_ptr(), int(adds), one.parallel]
            call(one.run, [*operands, *results, *exchange, *one.words, *shape.sizes(), *read, *rest, *added, *rest, *shared])
    if adds:
        of_k, of_v = of_k.copy_(sum_k), of_v.copy_(sum_v)
    return of_q, of_k, of_v, [x if x is None else x.to(t.dtype) for x, t in zip(sums, given.tables, strict=True)]


def empty_like_tokens(x: Tensor) -> Tensor:
    """Room for [batch, heads, tokens, dim], laid out as models want it: they transpose heads and tokens."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


_NOWHERE = [0] * 9


@dataclass(frozen=True, eq=False)
class Pair:
    """The two kernels for some of the heads, in the order in which they run."""

    launches: tuple[Launch, Launch]
    owned: frozenset[int]  # the tables of which each number belongs to one task


Sizes = tuple[tuple[int, ...] | None, ...]  # of the tables that want gradients


@lru_cache(maxsize=256)
def launches(shape: Shape, sizes: Sizes) -> tuple[Pair, ...]:
    """The launches of a backward pass, its groups of heads one after the other."""
    return tuple(_pair(shape, members, variant, sizes) for members, variant in head_groups(shape.variant, shape.heads))


def _pair(shape: Shape, members: Sequence[int], variant: Variant, sizes: Sizes) -> Pair:
    spec = spec_at(shape, variant, unit_for(shape.dtype) if shape.value_dim % 2 == 0 else Unit.FLOATS)
    read = [name for name, _ in spec.tables]
    numbers = [n for n, (name, size) in enumerate(zip(shape.names, sizes, strict=True)) if size is not None and name in read]
    wanted = tuple(shape.names[n] for n in numbers)
    first = launch(shape, members, spec, load(by_query(spec, wanted)), "backward", variant.mask)
    second = launch(shape, members, spec, load(by_key(spec, wanted)), "backward", variant.mask, by_key=True)
    where = {"heads": shape.heads, "kv_heads": shape.kv_heads, "k_len": shape.k_len, "first_key": shape.first_key}
    owned = (n for n in numbers if is_owned(spec, shape.names[n], sizes[n] or (), **where))
    return Pair((first, second), frozenset(owned))


def _words(x: Tensor) -> list[int]:
    return [x.data_ptr(), *x.stride()[:3]]
