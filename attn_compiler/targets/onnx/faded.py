"""What fades, as ONNX nodes: the running logs of a decay, what they leave of something, and weights whose terms fade apart."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.feature import component
from attn_compiler.targets.onnx.nodes import DTYPES, Nodes
from attn_compiler.targets.onnx.scope import All, Scope, Tokens
from attn_compiler.targets.operands import PLACE

Logs = tuple[ir.Value, ir.Value]  # at queries and at keys: columns [batch, heads, tokens, 1], or one for each feature, in float64


def logs_of(scope: Scope, fades: Expr) -> Logs:
    """The running logs of a decay: they grow with the length, and only their differences count."""
    spec = scope.spec
    at_query = _columns(scope, fades, spec.position, scope.queries, spec.q_len)
    return at_query, _columns(scope, fades, e.i, scope.keys, spec.k_len)


def log_before(scope: Scope, fades: Expr) -> ir.Value:
    """The running log at the last token before the first key."""
    return _columns(scope, fades, e.const(-1), All(1), 1)


def _columns(scope: Scope, fades: Expr, at: Expr, tokens: Tokens, length: int | str) -> ir.Value:
    """Printed where these tokens are the queries, and features are the keys."""
    spec, nodes = scope.spec, scope.nodes
    sizes = (dict(zip(node.args[-len(shape) :], shape, strict=True)) for node, shape in _tables(scope, fades))
    features = max((size.get(component, 1) for size in sizes), default=1)
    assert isinstance(features, int)
    here = Scope(replace(spec, q_len=length, k_len=features), nodes, scope.inputs, scope.heads, tokens, All(features))
    log = here.masks.real_tensor(fades.substitute({**spec.sizes, e.k: at, PLACE: at, component: PLACE}))
    return nodes.op("Expand", log, nodes.vector(1, 1, tokens.count, features))


def _tables(scope: Scope, fades: Expr) -> list[tuple[Expr, tuple[int | str, ...]]]:
    found = [(node, scope.spec.table(str(node.value)).shape) for node in fades.walk() if node.op == "table"]
    return [(node, shape) for node, shape in found if shape]


def fading(nodes: Nodes, later: ir.Value, earlier: ir.Value, real: str) -> ir.Value:
    """What a decay leaves between two tokens, from its running log; never more than all."""
    log = nodes.op("Min", nodes.op("Sub", later, earlier), nodes.constant(0.0, "float64"))
    return nodes.op("Exp", nodes.op("Cast", log, to=int(DTYPES[real])))


def one_by_one(scope: Scope, q: ir.Value, k: ir.Value, fades: Expr) -> ir.Value:
    """The weights of all queries and keys, [batch, heads, queries, keys], each term faded by itself."""
    nodes = scope.nodes
    at_q, at_k = logs_of(scope, fades)
    later, earlier = (nodes.vector(3), nodes.vector(2))
    left = fading(nodes, nodes.op("Unsqueeze", at_q, later), nodes.op("Unsqueeze", at_k, earlier), scope.real)
    terms = nodes.op("Mul", nodes.op("Unsqueeze", q, later), nodes.op("Unsqueeze", k, earlier))
    return nodes.op("ReduceSum", nodes.op("Mul", terms, left), nodes.vector(-1), keepdims=0)


class Doubled:
    """A chunk of tokens whose features fade apart, put together from pairs of blocks, each twice as long as the last ones.

    `near` are the weights of its queries and keys, below the diagonal and on it; `q` is faded since the chunk's first token,
    `k` until its last one, and `left` is what is left of a feature from the one to the other. Everything is a product of what
    single tokens leave, so that nothing overflows, however fast gates close.
    """

    def __init__(self, nodes: Nodes, q: ir.Value, k: ir.Value, log: ir.Value, size: int, real: str) -> None:
        self.nodes = nodes
        later = nodes.op("Concat", nodes.slice(log, 2, 1, size), nodes.slice(log, 2, size - 1, size), axis=2)
        axis = nodes.vector(3)
        self.q, self.left = (nodes.op("Unsqueeze", x, axis) for x in (q, fading(nodes, later, log, real)))
        terms = nodes.op("Mul", q, k)
        self.near = nodes.op("Unsqueeze", nodes.op("ReduceSum", terms, nodes.vector(-1), keepdims=1), axis)
        self.k = nodes.op("Mul", nodes.op("Unsqueeze", k, axis), self.left)
        block = 1
        while block < size:
            self._double(size // (2 * block), block)
            block *= 2
        self.q, self.k, self.near, self.left = (
            nodes.op("Squeeze", x, nodes.vector(2)) for x in (self.q, self.k, self.near, self.left)
        )

    def _double(self, count: int, block: int) -> None:
        """So many pairs of blocks, [batch, heads, pairs, tokens, …]."""
        nodes = self.nodes
        (q0, q1), (k0, k1), (near0, near1) = (self._halves(x, count, block) for x in (self.q, self.k, self.near))
        left0, left1 = self._halves(self.left, count, 1)
        between = nodes.op("MatMul", q1, nodes.turned(k0, 5))
        pads = nodes.vector(*[0] * 9, block)
        self.near = nodes.op("Concat", nodes.op("Pad", near0, pads), nodes.op("Concat", between, near1, axis=4), axis=3)
        self.q = nodes.op("Concat", q0, nodes.op("Mul", q1, left0), axis=3)
        self.k = nodes.op("Concat", nodes.op("Mul", k0, left1), k1, axis=3)
        self.left = nodes.op("Mul", left0, left1)

    def _halves(self, x: ir.Value, count: int, rows: int) -> tuple[ir.Value, ir.Value]:
        """The first and the second of each pair."""
        nodes = self.nodes
        halves = nodes.named("first"), nodes.named("second")
        nodes.write("Split", [nodes.reshape(x, 0, 0, count, 2 * rows, -1)], halves, {"axis": 3, "num_outputs": 2})
        return halves
