"""Runs the kernel of linear attention: no schedule, only how far ahead of a query its latest key stands."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.algebra.expr import b, i
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import Variant, passed_over
from attn_compiler.planning.site import UNKNOWN_LENGTH, Phase, Site
from attn_compiler.runtime.compiler import call, load
from attn_compiler.runtime.kernels import WORTH_THREADS, Shape, spec_at, table_words
from attn_compiler.targets.chunked import pays
from attn_compiler.targets.cpp.states import inlined, serves, stated, states
from attn_compiler.targets.featured import featured
from attn_compiler.targets.operands import Operands
from attn_compiler.torch_private import likely

WIDEST = 512  # features of a state that stays in the cache


@dataclass(frozen=True)
class Launch:
    """The kernel of a call, and what it is told besides its operands."""

    run: Callable[[int], object]
    behind: int | None
    numbers: tuple[int, ...]  # the places of its tables among those of the call


def prepared(operands: Operands, variant: Variant) -> tuple[Operands, Variant]:
    """A call whose feature map the kernel applies itself; other maps are applied before."""
    if inlined(variant):
        return operands, variant
    mapped, plain = featured(operands, variant, torch.promote_types(operands.q.dtype, torch.float32))
    return mapped, plain


def can_run(operands: Operands, variant: Variant) -> bool:
    """Whether the kernel can run a call that other kernels cannot, or for which they have twice as much to do."""
    found = serves(variant)
    counted = operands.first_query is not None and not isinstance(operands.k_positions, Tensor)
    if found is None or not counted or operands.differentiated or variant.feature.width(operands.q.shape[-1]) > WIDEST:
        return False
    q_len, k_len = (likely(size, UNKNOWN_LENGTH) for size in (operands.q_len, operands.k_len))
    return bool(passed_over(variant)) or pays(found, q_len, k_len, operands.q.shape[-1], operands.v.shape[-1])


def suits(site: Site, variant: Variant) -> bool:
    """Whether the kernel is for a site: its queries follow each other, and states save half of the work there."""
    found = serves(variant)
    if found is None or site.frame is None or site.phase is Phase.TRAIN or variant.feature.width(site.head_dim) > WIDEST:
        return False
    first = simplify(site.frame.position - i)
    counted = not first.mentions(i, b) and not first.tables()
    return counted and pays(found, site.q_hint, site.k_hint, variant.feature.width(site.head_dim), site.value_dim)


def is_alone(variant: Variant) -> bool:
    """Whether no other kernel than this one is for a variant, whatever its length, feature map included."""
    return serves(variant) is not None and inlined(variant) and passed_over(variant) is not None


def sources(shape: Shape) -> tuple[tuple[tuple[int, ...], str], ...]:
    """The source of the kernel, and the heads that it is for: all of them."""
    return ((tuple(range(shape.heads)), states(spec_at(shape, stated(shape.variant)))),)


@lru_cache(maxsize=128)
def _launch(shape: Shape) -> Launch:
    """The kernel for all calls that differ in lengths and positions only."""
    found = serves(shape.variant)
    assert found is not None
    spec = spec_at(shape, stated(shape.variant))
    run = load(states(spec)).states
    run.argtypes = [ctypes.c_void_p]
    return Launch(run, found.behind, tuple(shape.names.index(name) for name, _ in spec.tables))


def run(
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    totals: Tensor | None,
    tables: Sequence[Tensor],
    *,
    for_gradients: bool,
) -> None:
    """Fill `out`; there are no totals."""
    assert totals is None
    assert not for_gradients
    launch = _launch(replace(shape, batch=0, q_len=0, k_len=0, first_query=0, first_key=0, contents=()))
    offset, behind = shape.k_len, 0
    if launch.behind is not None:
        ahead = shape.first_query - shape.first_key - launch.behind
        offset = min(ahead, shape.k_len)
        behind = launch.behind + ahead - offset
    pointers = [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()]
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]]
    parallel = int(q.numel() * shape.value_dim >= WORTH_THREADS)
    of_tables = [x for n in launch.numbers for x in table_words(tables[n])]
    call(launch.run, [*pointers, *strides, parallel, offset, behind, *shape.sizes(), *of_tables])
