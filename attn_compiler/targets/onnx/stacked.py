"""Blocks of queries side by side, without a loop: one product for all of them, for importers that know no loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import true
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.targets.onnx.cut import BLOCK, EACH, SIZE, START, STEP, counting, reached, sizes, together
from attn_compiler.targets.onnx.formula import Group
from attn_compiler.targets.onnx.nodes import Nodes, Value
from attn_compiler.targets.onnx.scope import Blocks, Scope
from attn_compiler.targets.operands import PLACE
from attn_compiler.targets.tiled import Tiling, tiling
from attn_compiler.targets.walk import Walk

Attend = Callable[[Group], ir.Value]


@dataclass(frozen=True)
class _Stack:
    """Blocks that meet equally many keys."""

    queries: Blocks
    keys: Blocks
    count: Value
    exist: bool  # whether there are all the keys that they name


def in_reach(group: Group, attend: Attend) -> ir.Value:
    """Each block meets the keys in reach."""
    nodes, known = group.scope.nodes, sizes(group)
    counter = counting(nodes, known)
    count = counter.read(EACH * STEP)
    local = counting(nodes, {**known, BLOCK: nodes.reshape(nodes.range(0, count), -1, 1)})

    def steps(length: Value) -> ir.Value:
        return nodes.op("Mul", nodes.range(0, length), nodes.index(known[STEP]))

    keys = reached(group)
    width = counter.read(keys.most)
    queries = nodes.op("Add", nodes.index(local.read(START)), steps(known[SIZE]))
    near = nodes.op("Add", nodes.index(local.read(keys.start)), steps(width))
    listed = _before(nodes, near, local.read(keys.stop), known[e.k_len])
    if local.read(keys.ahead) != 0:
        first = e.minimum(group.sides.prefix, e.k_len)
        ahead = _before(nodes, nodes.range(0, counter.read(first)), local.read(keys.ahead), known[e.k_len])
        listed, width = nodes.op("Concat", ahead, listed, axis=1), counter.read(first + keys.most)
    last = nodes.index(counter.read(e.k_len - 1))
    blocks = Blocks(listed, nodes.op("Min", listed, last), width)
    out = _attended(group, _Stack(Blocks(queries, queries, known[SIZE]), blocks, count, exist=False), attend)
    return together(group, out, counter)


def _before(nodes: Nodes, places: ir.Value, stop: Value, none: Value) -> ir.Value:
    """Places before `stop`; the others name no key."""
    return nodes.op("Where", nodes.op("Less", places, nodes.index(stop)), places, nodes.index(none))


def by_lists(group: Group, attend: Attend, walk: Walk) -> ir.Value:
    """Each block meets the tiles of keys that a list names; blocks with about as many are computed together."""
    nodes, spec = group.scope.nodes, group.scope.spec
    assert isinstance(spec.q_len, int)
    assert isinstance(spec.k_len, int)
    found = tiling(walk, spec.q_len, spec.k_len)
    shown = replace(group, variant=replace(group.variant, mask=true)) if walk.full else group
    parts = [_attended(shown, stack, attend) for stack in _stacks(nodes, found, spec.k_len)]
    whole = parts[0] if len(parts) == 1 else nodes.op("Concat", *parts, axis=2)
    return nodes.op("Gather", whole, nodes.constant(found.back.numpy(), "int64"), axis=2)


def _stacks(nodes: Nodes, found: Tiling, k_len: int) -> Iterator[_Stack]:
    for batch in found.batches:
        listed = (batch.tiles[..., None] * found.keys + torch.arange(found.keys)).flatten(1)
        inside = listed.clamp(max=k_len - 1)
        places = inside if found.k_order is None else found.k_order[inside]
        named = places.where(listed < k_len, k_len)
        queries = nodes.constant(batch.queries.numpy(), "int64")
        keys = Blocks(nodes.constant(named.numpy(), "int64"), nodes.constant(places.numpy(), "int64"), listed.shape[1])
        yield _Stack(Blocks(queries, queries, batch.queries.shape[1]), keys, len(listed), batch.exist)


def _attended(group: Group, stack: _Stack, attend: Attend) -> ir.Value:
    """The rows of all blocks, one behind the other."""
    outer, nodes = group.scope, group.scope.nodes
    scope = Scope(outer.spec, nodes, outer.inputs, outer.heads, stack.queries, stack.keys, blocks=stack.count)
    q, k, v = (
        tokens.pick(nodes, x, 2)
        for tokens, x in ((stack.queries, group.block.q), (stack.keys, group.block.k), (stack.keys, group.block.v))
    )
    mask = group.variant.mask if stack.exist else group.variant.mask & e.apply("lt", PLACE, e.k_len)
    empty = group.empty
    if empty is not None and group.variant.empty_rows is EmptyRows.MEAN:
        empty = nodes.op("Unsqueeze", empty, nodes.vector(2))
    block, variant = replace(group.block, q=q, k=k, v=v), replace(group.variant, mask=mask)
    here = replace(group, scope=scope, block=block, variant=variant, empty=empty)
    return nodes.reshape(attend(here), 0, len(scope.heads), -1, scope.spec.value_dim)
