"""Linear attention as a loop over chunks: queries meet the keys of their own, and of earlier ones the state that they left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, maximum, minimum
from attn_compiler.algebra.simplify import simplify
from attn_compiler.targets.linear import NEAR, Linear
from attn_compiler.targets.onnx.chunks import padded, plus, power_of_two
from attn_compiler.targets.onnx.cut import counting
from attn_compiler.targets.onnx.faded import Doubled, Logs, fading, log_before, logs_of
from attn_compiler.targets.onnx.formula import Group, grouped
from attn_compiler.targets.onnx.mapped import by_heads, by_query_heads
from attn_compiler.targets.onnx.nodes import Nodes, Value
from attn_compiler.targets.onnx.scope import Neighbors, Scope
from attn_compiler.targets.operands import PLACE

SIZE = minimum(e.q_len, NEAR)  # of a chunk whose tokens fade alike


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
    logs: Logs | None
    before: ir.Value | None  # the log before the first key, where there is a decay
    ahead: Value
    size: Expr  # of a chunk

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
        size: Expr = SIZE
        if found.fades is not None:
            logs, before = logs_of(scope, found.fades), log_before(scope, found.fades)
        if found.behind is None or group.first is None:
            return cls(group, k, v, logs, before, 0, size)
        if group.variant.gates is not None:
            size = e.const(power_of_two(scope.queries.count))
        rounded = (e.q_len + size - 1) // size * size
        same = {e.k_len: e.q_len} if spec.q_len == spec.k_len else {}
        offset = simplify((group.first - found.behind).substitute(same))
        count = counting(nodes, {e.q_len: scope.queries.count, e.k_len: scope.keys.count})
        front, ahead = count.read(maximum(-offset, 0)), count.read(maximum(offset, 0))
        rest, end = count.read(rounded - e.q_len), count.read(maximum(simplify((rounded + offset - e.k_len).substitute(same)), 0))
        k, v = (padded(nodes, x, 2, front, end) for x in (k, v))
        q = padded(nodes, group.block.q, 2, 0, rest)
        if logs:
            at_q = padded(nodes, logs[0], 2, 0, rest, mode="edge")
            logs = (at_q, padded(nodes, logs[1], 2, front, end, mode="edge"))
        group = replace(group, block=replace(group.block, q=q))
        tokens = cls(group, k, v, logs, before, ahead, size)
        aligned = found.behind == 0 and offset == e.const(0)
        return tokens if group.variant.gates is None or aligned else tokens._from_latest()

    def _from_latest(self) -> Tokens:
        """Queries that stand where the latest keys stand which they see, and are faded since then."""
        group, nodes, logs = self.group, self.group.scope.nodes, self.logs
        assert logs is not None
        latest = nodes.slice(logs[1], 2, self.ahead, plus(nodes, self.ahead, nodes.size(logs[0], 2)))
        q = nodes.op("Mul", group.block.q, fading(nodes, logs[0], latest, group.scope.real))
        return replace(self, group=replace(group, block=replace(group.block, q=q)))

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
        count = nodes.slice(count, 2, self.ahead, plus(nodes, self.ahead, scope.queries.count))
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
        size = count.read(self.tokens.size)
        state = self._start()

        def step(inner: Nodes, number: ir.Value, given: Sequence[ir.Value]) -> tuple[Sequence[ir.Value], ir.Value]:
            gathered, left = self._chunk(inner, inner.op("Mul", number, inner.index(size)), size, given)
            return left, gathered

        types = [scope.real, *("float64" for _ in state[1:])]
        chunks = (e.q_len + self.tokens.size - 1) // self.tokens.size
        after, stacked = nodes.carrying(step, state, types, nodes.range(0, count.read(chunks)))
        rows = nodes.reshape(stacked, 0, len(scope.heads), -1, scope.spec.value_dim + 1)
        rest = count.read(chunks * self.tokens.size - e.q_len)
        return (rows if rest == 0 else nodes.slice(rows, 2, 0, scope.queries.count)), after[0]

    def _start(self) -> list[ir.Value]:
        """The state before the first query: the past, or the keys that all queries see."""
        tokens, scope = self.tokens, self.tokens.group.scope
        nodes = scope.nodes
        if self.past is not None:
            return [self.past.sums, *([] if tokens.before is None else [self._whole_log(tokens.before)])]
        k, v = (nodes.slice(x, 2, 0, tokens.ahead) for x in (tokens.k, tokens.v))
        faded = []
        if tokens.logs is not None:
            place = nodes.op("Max", nodes.index(plus(nodes, tokens.ahead, -1)), nodes.index(0))
            faded = [nodes.slice(tokens.logs[1], 2, place, plus(nodes, place, 1))]
            log = nodes.slice(tokens.logs[1], 2, 0, tokens.ahead)
            k = nodes.op("Mul", k, fading(nodes, faded[0], log, scope.real))
        k, v = (padded(nodes, x, 2, 1, 0) for x in (k, v))  # onnxruntime's products over no keys are not always zero
        return [nodes.op("MatMul", nodes.turned(k), v), *faded]

    def _whole_log(self, log: ir.Value) -> ir.Value:
        """A log for all heads, with the axes of one at a key."""
        tokens, nodes = self.tokens, self.tokens.group.scope.nodes
        assert tokens.logs is not None
        return nodes.op("Expand", log, nodes.op("Shape", nodes.slice(tokens.logs[1], 2, 0, 1)))

    def _chunk(self, nodes: Nodes, start: Value, size: Value, state: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        """What the queries of one chunk gather, and the state after it."""
        tokens, group = self.tokens, self.tokens.group
        outer, kv_heads = group.scope, group.block.kv_heads
        stop = plus(nodes, start, size)
        queries = Neighbors(start, stop, size)
        keys = Neighbors(plus(nodes, start, tokens.ahead), plus(nodes, stop, tokens.ahead), size)
        here = Scope(outer.spec, nodes, outer.inputs, outer.heads, queries, keys, outer)
        q, k, v = queries.pick(nodes, group.block.q, 2), keys.pick(nodes, tokens.k, 2), keys.pick(nodes, tokens.v, 2)
        left, ends = state[0], list[ir.Value]()
        if tokens.logs is None:
            near = grouped(here, q, nodes.turned(k), kv_heads)
        else:
            log, real = keys.pick(nodes, tokens.logs[1], 2), outer.real
            end = nodes.slice(tokens.logs[1], 2, plus(nodes, keys.stop, -1), keys.stop)
            left, ends = nodes.op("Mul", left, nodes.turned(fading(nodes, end, state[1], real))), [end]
            if group.variant.gates is None:
                at_q = queries.pick(nodes, tokens.logs[0], 2)
                near = grouped(here, q, nodes.turned(k), kv_heads)
                near = nodes.op("Mul", near, fading(nodes, at_q, nodes.turned(log), real))
                q = nodes.op("Mul", q, fading(nodes, at_q, state[1], real))
                k = nodes.op("Mul", k, fading(nodes, end, log, real))
            else:
                assert isinstance(size, int)
                whole = Doubled(nodes, q, k, log, size, real)
                near, k = whole.near, whole.k
                q = nodes.op("Mul", whole.q, fading(nodes, nodes.slice(log, 2, 0, 1), state[1], real))
        near = grouped(here, nodes.op("Trilu", near, upper=0), v, kv_heads)
        gathered = nodes.op("Add", near, grouped(here, q, state[0], kv_heads))
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
