"""Which kernel of a call is to be compiled ahead of time, as `ahead` takes it."""

from __future__ import annotations

from dataclasses import replace

from attn_compiler.runtime.ahead import Order
from attn_compiler.runtime.kernels import Shape, spec_at
from attn_compiler.runtime.visits import visited
from attn_compiler.targets.cpp.decode import reach_of
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.triton import states
from attn_compiler.targets.triton.blocks import Blocks, Kind
from attn_compiler.targets.triton.decode import decoding
from attn_compiler.targets.triton.gradient import by_key, by_query
from attn_compiler.targets.triton.source import can_specialize, source


def order(shape: Shape, kind: Kind, blocks: Blocks, machine: str, group: int = 0) -> Order:
    """The kernel for one of the groups of heads, cut so; tables want no gradients."""
    _, variant = head_groups(shape.variant, shape.heads)[group]
    tables = tuple((stored.dtype, stored.axes) for _, stored in spec_at(shape, variant).tables)
    return Order(text(shape, kind, blocks, group), shape.dtype, tables, machine, blocks)


def suits(shape: Shape, blocks: Blocks, group: int) -> bool:
    """Whether the kernel for one of the groups of heads can be cut so."""
    if not blocks.specialized:
        return True
    members, variant = head_groups(shape.variant, shape.heads)[group]
    spec = spec_at(shape, variant)
    return can_specialize(spec, visited(shape, members, variant, spec, (blocks.queries, blocks.keys)).iteration)


def text(shape: Shape, kind: Kind, blocks: Blocks, group: int) -> str:
    """The kernel."""
    if kind in states.KERNELS:
        return states.source(kind, shape.dim, shape.value_dim, shape.dtype, states.SEGMENT, blocks.width, fades=bool(shape.names))
    members, variant = head_groups(shape.variant, shape.heads)[group]
    spec = spec_at(shape, variant)
    if kind == "decode":
        return decoding(spec, reach_of(variant.mask, k_counted=shape.k_counted))
    if kind == "backward_kv":
        return by_key(spec, visited(shape, members, variant, spec, (blocks.keys, blocks.queries), by_key=True).iteration, ())
    iteration = visited(shape, members, variant, spec, (blocks.queries, blocks.keys)).iteration
    if kind == "forward":
        return source(spec, replace(iteration, specialized=blocks.specialized))
    return by_query(spec, iteration, ())
