"""Runs the kernels for few queries: nothing is worked out anew where lengths and positions change from call to call."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from attn_compiler.algebra.storage import PLAIN
from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime import kernels
from attn_compiler.runtime.compiler import call, load
from attn_compiler.runtime.kernels import WORTH_THREADS, Shape, spec_at, spec_of_few, table_words
from attn_compiler.targets.cpp.decode import MOST_QUERIES, decoding, reach_of
from attn_compiler.targets.operands import head_groups


@dataclass(frozen=True)
class Launch:
    """One kernel for some of the heads."""

    run: Callable[[int], object]
    words: tuple[int, ...]  # the heads in groups that share their keys, and how far the mask reaches
    kept: tuple[array[int], ...]  # what the words point to
    numbers: tuple[int, ...]  # the places of its tables among those of the call


def launches(shape: Shape) -> tuple[Launch, ...]:
    """The launches of all calls that differ from `shape` in lengths and positions only."""
    return tuple(_launch(shape, members, variant) for members, variant in head_groups(shape.variant, shape.heads))


def sources(shape: Shape) -> tuple[tuple[tuple[int, ...], str], ...]:
    """The sources of a call's kernels, whatever its length, and the heads that each is for."""
    parts = shape.variant.parts()
    if shape.q_len > MOST_QUERIES or any(part.dropout or part.storage != PLAIN for part in parts):
        return kernels.sources(shape)
    return tuple((members, decoding(spec_at(shape, variant))) for members, variant in head_groups(shape.variant, shape.heads))


def run(
    launched: Sequence[Launch],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    totals: Tensor | None,
    tables: Sequence[Tensor],
    layer: tuple[int, int],
    first: Sequence[int],
) -> None:
    """Fill `out` and `totals`; `layer` is its number, and that of all layers."""
    batch, heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1:3]
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if totals is None else totals.data_ptr())
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    parallel = int(q.numel() * k_len >= WORTH_THREADS)
    for one in launched:
        of_tables = [x for n in one.numbers for x in table_words(tables[n])]
        sizes = (batch, heads, kv_heads, q_len, k_len, *layer, *first)
        call(one.run, (*pointers, *strides, parallel, *one.words, *sizes, *of_tables))


def _launch(shape: Shape, members: Sequence[int], variant: Variant) -> Launch:
    spec = spec_of_few(shape, variant)
    kernel = load(decoding(spec)).decode
    kernel.argtypes = [ctypes.c_void_p]
    ratio = shape.heads // shape.kv_heads
    first = [n for n, head in enumerate(members) if not n or head // ratio != members[n - 1] // ratio]
    kept = array("i", [*first, len(members)]), array("i", members)
    reach = reach_of(variant.mask, k_counted=shape.k_counted)
    words = (len(first), *(x.buffer_info()[0] for x in kept), *reach)
    return Launch(kernel, words, kept, tuple(shape.names.index(name) for name, _ in spec.tables))
