"""Which kernel of a call is to be compiled ahead of time, as `ahead` takes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from attn_compiler.algebra.storage import PLAIN
from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.ahead import Order
from attn_compiler.runtime.kernels import Shape, spec_at, spec_of_few
from attn_compiler.runtime.visits import visited
from attn_compiler.targets.cpp.decode import reach_of
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.triton import states
from attn_compiler.targets.triton.blocks import Blocks, Kind, candidates
from attn_compiler.targets.triton.coded import held, multiplied, with_scales
from attn_compiler.targets.triton.decode import decoding
from attn_compiler.targets.triton.gradient import along_diagonals, by_key, by_query
from attn_compiler.targets.triton.source import can_specialize, source


def cuts(shape: Shape, kind: Kind, machine: str = "", group: int = 0) -> tuple[Blocks, ...]:
    """How it is worth trying to cut the kernel for one of the groups of heads, the likeliest first."""
    _, variant = head_groups(shape.variant, shape.heads)[group]
    of = multiplied(spec_of(shape, kind, variant))
    codes = kind == "forward" and variant.storage != PLAIN
    dtype, apart = "float32" if "float32" in of else of[1], states.is_apart(states.named(shape.names))
    return candidates(kind, dtype, max(shape.dim, shape.value_dim), machine, codes=codes, apart=apart)


def order(shape: Shape, kind: Kind, blocks: Blocks, machine: str, group: int = 0, wanted: Collection[str] = ()) -> Order:
    """The kernel for one of the groups of heads, cut so; `wanted` are the tables that want gradients."""
    _, variant = head_groups(shape.variant, shape.heads)[group]
    spec = spec_of(shape, kind, variant)
    tables = tuple((stored.dtype, stored.axes) for _, stored in spec.tables)
    sums = tuple(stored.axes for name, stored in spec.tables if name in wanted)
    of, printed = tuple(held(spec).items()), text(shape, kind, blocks, group, wanted)
    return Order(printed, shape.dtype, tables, machine, blocks, of, multiplied(spec), sums=sums)


def spec_of(shape: Shape, kind: Kind, variant: Variant) -> Spec:
    """All that determines the kernel of a variant without groups."""
    return spec_of_few(shape, variant) if kind == "decode" else with_scales(spec_at(shape, variant))


def suits(shape: Shape, blocks: Blocks, group: int) -> bool:
    """Whether the kernel for one of the groups of heads can be cut so."""
    if not blocks.specialized:
        return True
    members, variant = head_groups(shape.variant, shape.heads)[group]
    spec = spec_at(shape, variant)
    return can_specialize(spec, visited(shape, members, variant, spec, (blocks.queries, blocks.keys)).iteration)


def text(shape: Shape, kind: Kind, blocks: Blocks, group: int, wanted: Collection[str] = ()) -> str:
    """The kernel."""
    if kind in states.FILES:
        fades = states.named(shape.names)
        return states.source(kind, shape.dim, shape.value_dim, shape.dtype, states.SEGMENT, blocks.width, fades=fades)
    members, variant = head_groups(shape.variant, shape.heads)[group]
    spec = spec_of(shape, kind, variant)
    if kind == "decode":
        return decoding(spec, reach_of(variant.mask, k_counted=shape.k_counted))
    names = tuple(name for name, _ in spec.tables if name in wanted)
    if kind == "diagonals":
        return along_diagonals(spec, names)
    if kind == "backward_kv":
        return by_key(spec, visited(shape, members, variant, spec, (blocks.keys, blocks.queries), by_key=True).iteration, names)
    iteration = visited(shape, members, variant, spec, (blocks.queries, blocks.keys)).iteration
    if kind == "forward":
        return source(spec, replace(iteration, specialized=blocks.specialized))
    return by_query(spec, iteration, names)
