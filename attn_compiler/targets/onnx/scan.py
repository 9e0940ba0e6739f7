"""A loop over blocks of queries, each of which meets only the keys in reach: time and memory grow with the reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from attn_compiler.targets.onnx.cut import BLOCK, EACH, SIZE, START, STEP, counting, reached, sizes, together
from attn_compiler.targets.onnx.formula import Group, attend
from attn_compiler.targets.onnx.nodes import Nodes, Value
from attn_compiler.targets.onnx.printer import Printer
from attn_compiler.targets.onnx.scope import Joined, Neighbors, Scope, Tokens


def scan(group: Group) -> ir.Value:
    """One block after the other."""
    scope, nodes, known = group.scope, group.scope.nodes, sizes(group)
    counter = counting(nodes, known)

    def step(inner: Nodes) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        number = ir.Value(name=inner.named("block").name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        local = counting(inner, {**known, BLOCK: number})
        stop = local.read(START + (SIZE - 1) * STEP + 1)
        queries = Neighbors(local.read(START), stop, known[SIZE], known[STEP])
        keys = _in_reach(group, local, known[STEP])
        q, k, v = queries.pick(inner, group.block.q, 2), keys.pick(inner, group.block.k, 2), keys.pick(inner, group.block.v, 2)
        here = Scope(scope.spec, inner, scope.inputs, scope.heads, queries, keys, scope)
        return [number], [attend(replace(group, scope=here, block=replace(group.block, q=q, k=k, v=v)))]

    blocks = nodes.range(0, counter.read(EACH * STEP))
    stacked = nodes.op("Scan", blocks, num_scan_inputs=1, scan_output_axes=[2], body=nodes.inside(step, "block"))
    return together(group, nodes.reshape(stacked, 0, len(scope.heads), -1, scope.spec.value_dim), counter)


def _in_reach(group: Group, local: Printer, step: Value) -> Tokens:
    """The keys of one block."""
    keys = reached(group)
    count = (keys.stop - keys.start + STEP - 1) // STEP
    near = Neighbors(local.read(keys.start), local.read(keys.stop), local.read(count), step)
    ahead = local.read(keys.ahead)
    if ahead == 0:
        return near
    return Joined((Neighbors(0, ahead, ahead), near), local.read(keys.ahead + count))
