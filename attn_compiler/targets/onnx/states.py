"""Linear attention as a loop over chunks: queries meet the keys of their own, and of earlier ones the state that they left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, maximum, minimum
from attn_compiler.algebra.simplify import simplify
from attn_compiler.targets.linear import NEAR, Linear
from attn_compiler.targets.onnx.cut import counting
from attn_compiler.targets.onnx.formula import Group, grouped
from attn_compiler.targets.onnx.mapped import by_heads, by_query_heads
from attn_compiler.targets.onnx.nodes import DTYPES, Nodes, Value
from attn_compiler.targets.onnx.scope import Neighbors, Scope
from attn_compiler.targets.operands import PLACE

SIZE = minimum(e.q_len, NEAR)  # of a chunk
ROUNDED = (e.q_len + SIZE - 1) // SIZE * SIZE


@dataclass(frozen=True)
class State:
    """What is left of earlier tokens: the sums of feature * [v, 1], and those of [v, 1], which nothing fades."""

    sums: ir.Value  # [batch, kv heads, features, value dim + 1]
    count: ir.Value  # [batch, kv heads, 1, value dim + 1]


def states(group: Group, found: Linear) -> ir.Value:
    """The output of all queries."""
    return continued(group, found, None)[0]


def gathered_by(group: Group, found: Linear, gather: Callable[[Tokens], ir.Value]) -> ir.Value:
    """The same where `gather` says what queries gather of keys up to their own."""
    tokens = Tokens.of(group, found)
    return _result(tokens.group, gather(tokens), tokens.running(None))


def continued(group: Group, found: Linear, past: State | None) -> tuple[ir.Value, State | None]:
    """The output, and the state after all tokens, whose `past` is a state; where queries see all keys there is no such state."""
    tokens = Tokens.of(group, found)
    nodes, group = tokens.group.scope.nodes, tokens.group
    if found.behind is None:
        sums = nodes.op("MatMul", nodes.turned(tokens.k), tokens.v)
        return _result(
            group,
            grouped(group.scope, group.block.q, sums, group.block.kv_heads),
            by_heads(group.scope, tokens.total(), group.block.kv_heads),
        ), None
    acc, sums = _Chunks(tokens, past).run()
    seen = tokens.running(past)
    return _result(group, acc, seen), State(sums, tokens.total(past))


def _result(group: Group, gathered: ir.Value, seen: ir.Value) -> ir.Value:
    """The output from the sums of weight * [v, 1], and from those of what each query sees."""
    scope, nodes, normalizer, width = group.scope, group.scope.nodes, group.variant.normalizer, group.scope.spec.value_dim
    mass = nodes.slice(gathered, 3, width, width + 1)
    known: dict[Expr, Value] = {e.acc: nodes.slice(gathered, 3, 0, width), e.mass: mass}
    count = nodes.slice(seen, 3, width, width + 1)
    if group.empty is None:
        known |= {e.seen: count, e.values: nodes.slice(seen, 3, 0, width)}
        return scope.scores.real_tensor(normalizer.output, known)
    sees, one = nodes.op("Greater", count, nodes.constant(0, scope.real)), nodes.constant(1, scope.real)
    known |= {e.mass: nodes.op("Where", sees, mass, one), e.seen: nodes.op("Where", sees, count, one)}
    known[e.values] = nodes.slice(seen, 3, 0, width)
    return nodes.op("Where", sees, scope.scores.real_tensor(normalizer.output, known), group.empty)


@dataclass(frozen=True)
class Tokens:
    """The keys that exist, mapped, and [v, 1] of them, in line with the queries: query i sees keys up to i + `ahead`."""

    group: Group
    k: ir.Value
    v: ir.Value
    logs: tuple[ir.Value, ir.Value] | None  # of a decay, running, at the queries and at the keys
    before: Value | None  # the log before the first key, where there is a decay
    ahead: Value

    @classmethod
    def of(cls, group: Group, found: Linear) -> Tokens:
        scope = group.scope
        nodes, spec = scope.nodes, scope.spec
        if found.fades is not None or found.shown.mentions(e.h):
            group = _with_block(group)
        k, v = group.block.k, group.block.v
        v = ones_beside(nodes, v, scope.real)
        placed = {**spec.sizes, e.k: PLACE}
        shown = scope.masks.read(found.shown.substitute(placed))
        if shown is not True:
            exists = nodes.turned(_whole(nodes, scope.masks.tensor(shown, Sort.BOOL)))
            k, v = (nodes.op("Where", exists, x, nodes.constant(0, scope.real)) for x in (k, v))
        logs = before = None
        if found.fades is not None:
            at = [found.fades.substitute({**spec.sizes, e.k: where}) for where in (spec.position, PLACE)]
            logs = (_whole(nodes, scope.masks.real_tensor(at[0])), _whole(nodes, scope.masks.real_tensor(at[1])))
            before = scope.masks.real_tensor(found.fades.substitute({**spec.sizes, e.k: e.const(-1)}))
        if found.behind is None or group.first is None:
            return cls(group, k, v, logs, before, 0)
        same = {e.k_len: e.q_len} if spec.q_len == spec.k_len else {}
        offset = simplify((group.first - found.behind).substitute(same))
        count = counting(nodes, {e.q_len: scope.queries.count, e.k_len: scope.keys.count})
        front, ahead = count.read(maximum(-offset, 0)), count.read(maximum(offset, 0))
        end = count.read(maximum(simplify((ROUNDED + offset - e.k_len).substitute(same)), 0))
        k, v = (_padded(nodes, x, 2, front, end) for x in (k, v))
        q = _padded(nodes, group.block.q, 2, 0, count.read(ROUNDED - e.q_len))
        group = replace(group, block=replace(group.block, q=q))
        if logs:
            at_q = _padded(nodes, logs[0], 2, 0, count.read(ROUNDED - e.q_len), mode="edge")
            logs = (at_q, _padded(nodes, logs[1], 3, front, end, mode="edge"))
        return cls(group, k, v, logs, before, ahead)

    def total(self, past: State | None = None) -> ir.Value:
        """How many keys there are, and the sum of their v: [batch, heads, 1, value dim + 1]."""
        nodes = self.group.scope.nodes
        count = nodes.op("ReduceSum", self.v, nodes.vector(2), keepdims=1)
        return count if past is None else nodes.op("Add", past.count, count)

    def running(self, past: State | None) -> ir.Value:
        """The same of those that each query sees."""
        scope = self.group.scope
        nodes, counted = scope.nodes, self.group.variant.normalizer.counts
        if not counted and self.group.empty is None:
            return self.total()  # which nobody reads
        count = nodes.op("CumSum", self.v, nodes.index(2))
        count = nodes.slice(count, 2, self.ahead, _plus(nodes, self.ahead, scope.queries.count))
        count = count if past is None else nodes.op("Add", count, past.count)
        return by_heads(scope, count, self.group.block.kv_heads)


@dataclass(frozen=True)
class _Chunks:
    """Queries in chunks of one size, the last one filled up; the state knows the log up to which it has faded."""

    tokens: Tokens
    past: State | None

    def run(self) -> tuple[ir.Value, ir.Value]:
        """What all queries gather, and the state after them."""
        scope = self.tokens.group.scope
        nodes = scope.nodes
        count = counting(nodes, {e.q_len: scope.queries.count})
        size = count.read(SIZE)
        state = self._start()

        def step(inner: Nodes, number: ir.Value, given: Sequence[ir.Value]) -> tuple[Sequence[ir.Value], ir.Value]:
            gathered, left = self._chunk(inner, inner.op("Mul", number, inner.index(size)), size, given)
            return left, gathered

        types = [scope.real, *("float64" for _ in state[1:])]
        after, stacked = nodes.carrying(step, state, types, nodes.range(0, count.read(ROUNDED // SIZE)))
        rows = nodes.reshape(stacked, 0, len(scope.heads), -1, scope.spec.value_dim + 1)
        return (rows if count.read(ROUNDED - e.q_len) == 0 else nodes.slice(rows, 2, 0, scope.queries.count)), after[0]

    def _start(self) -> list[ir.Value]:
        """The state before the first query: the past, or the keys that all queries see."""
        tokens, scope = self.tokens, self.tokens.group.scope
        nodes = scope.nodes
        if self.past is not None:
            return [self.past.sums, *([] if tokens.logs is None else [self._whole_log(tokens.before)])]
        k, v = (nodes.slice(x, 2, 0, tokens.ahead) for x in (tokens.k, tokens.v))
        faded = []
        if tokens.logs is not None:
            place = nodes.op("Max", nodes.index(_plus(nodes, tokens.ahead, -1)), nodes.index(0))
            faded = [nodes.slice(tokens.logs[1], 3, place, _plus(nodes, place, 1))]
            log = nodes.slice(tokens.logs[1], 3, 0, tokens.ahead)
            k = nodes.op("Mul", k, nodes.turned(_fading(nodes, faded[0], log, scope.real)))
        k, v = (_padded(nodes, x, 2, 1, 0) for x in (k, v))  # onnxruntime's products over no keys are not always zero
        return [nodes.op("MatMul", nodes.turned(k), v), *faded]

    def _whole_log(self, log: Value | None) -> ir.Value:
        """A log for all heads, with the axes of one at a key."""
        tokens, nodes = self.tokens, self.tokens.group.scope.nodes
        assert tokens.logs is not None
        assert isinstance(log, ir.Value)
        return nodes.op("Expand", log, nodes.op("Shape", nodes.slice(tokens.logs[1], 3, 0, 1)))

    def _chunk(self, nodes: Nodes, start: Value, size: Value, state: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        """What the queries of one chunk gather, and the state after it."""
        tokens, group = self.tokens, self.tokens.group
        outer = group.scope
        stop = _plus(nodes, start, size)
        queries = Neighbors(start, stop, size)
        keys = Neighbors(_plus(nodes, start, tokens.ahead), _plus(nodes, stop, tokens.ahead), size)
        here = Scope(outer.spec, nodes, outer.inputs, outer.heads, queries, keys, outer)
        q, k, v = queries.pick(nodes, group.block.q, 2), keys.pick(nodes, tokens.k, 2), keys.pick(nodes, tokens.v, 2)
        near, left = grouped(here, q, nodes.turned(k), group.block.kv_heads), state[0]
        ends: list[ir.Value] = []
        if tokens.logs is not None:
            at_q, at_k = queries.pick(nodes, tokens.logs[0], 2), keys.pick(nodes, tokens.logs[1], 3)
            end = nodes.slice(tokens.logs[1], 3, _plus(nodes, keys.stop, -1), keys.stop)
            near = nodes.op("Mul", near, _fading(nodes, at_q, at_k, outer.real))
            q = nodes.op("Mul", q, _fading(nodes, at_q, state[1], outer.real))
            k = nodes.op("Mul", k, nodes.turned(_fading(nodes, end, at_k, outer.real)))
            left, ends = nodes.op("Mul", left, _fading(nodes, end, state[1], outer.real)), [end]
        near = grouped(here, nodes.op("Trilu", near, upper=0), v, group.block.kv_heads)
        gathered = nodes.op("Add", near, grouped(here, q, state[0], group.block.kv_heads))
        return gathered, [nodes.op("Add", left, nodes.op("MatMul", nodes.turned(k), v)), *ends]


def _with_block(group: Group) -> Group:
    """The same heads, keys and values once for each of them."""
    return replace(group, block=by_query_heads(group.scope, group.block))


def _whole(nodes: Nodes, x: ir.Value) -> ir.Value:
    """All four axes, of one where nothing varies."""
    return nodes.op("Expand", x, nodes.vector(1, 1, 1, 1))


def ones_beside(nodes: Nodes, v: ir.Value, real: str) -> ir.Value:
    """[v, 1]: what gathers in the last column is the sum of weights."""
    ones = nodes.op("Expand", nodes.constant(1, real), nodes.op("Shape", nodes.slice(v, 3, 0, 1)))
    return nodes.op("Concat", v, ones, axis=3)


def _padded(nodes: Nodes, x: ir.Value, axis: int, front: Value, end: Value, mode: str = "constant") -> ir.Value:
    if front == 0 and end == 0:
        return x
    pads: list[Value] = [0] * 8
    pads[axis], pads[4 + axis] = front, end
    return nodes.op("Pad", x, nodes.vector(*pads), mode=mode)


def _plus(nodes: Nodes, a: Value, b: Value) -> Value:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return a if b == 0 else b if a == 0 else nodes.op("Add", nodes.index(a), nodes.index(b))


def _fading(nodes: Nodes, later: ir.Value, earlier: ir.Value, real: str) -> ir.Value:
    """What a decay leaves between two tokens, from its running log; never more than all."""
    log = nodes.op("Min", nodes.op("Sub", later, earlier), nodes.constant(0.0, "float64"))
    return nodes.op("Exp", nodes.op("Cast", log, to=int(DTYPES[real])))
