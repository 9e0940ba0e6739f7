"""Attention by PyTorch's flex_attention: mask and score are printed as the functions of one pair that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, const
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Variant, passed_over
from attn_compiler.targets.around import CARRIED, around
from attn_compiler.targets.blocks import every_query_sees_itself
from attn_compiler.targets.operands import PLACE, Operands
from attn_compiler.targets.torch_target import Result, by_group

_OPERATORS: Mapping[str, str] = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})", "floordiv": "({} // {})",
    "mod": "({} % {})", "lt": "({} < {})", "le": "({} <= {})", "eq": "({} == {})", "and": "({} & {})", "or": "({} | {})",
    "not": "(~{})", "min": "torch.minimum({}, {})", "max": "torch.maximum({}, {})", "where": "torch.where({}, {}, {})",
    "pow": "torch.pow({}, {})", "abs": "torch.abs({})", "exp": "torch.exp({})", "log": "torch.log({})",
    "sqrt": "torch.sqrt({})", "tanh": "torch.tanh({})", "sigmoid": "torch.sigmoid({})", "real": "({}).to(torch.float32)",
    "ceil": "torch.ceil({}).to(torch.int64)", "floor": "torch.floor({}).to(torch.int64)",
}  # fmt: skip
_LEAVES = {e.b: "b", e.h: "h", e.i: "i", PLACE: "j", e.dot: "score"}


class FlexTarget:
    """PyTorch's compiler for masks and scores; it runs where it is asked for by name."""

    name = "flex"

    def refuse(self, operands: Operands, variant: Variant, *, lse: bool = False) -> str | None:
        device = operands.q.device.type
        if lse:
            return "its log-sum-exp is not read"
        if device == "cpu" and operands.differentiated:
            return "flex_attention has no gradients on a CPU"
        if operands.q_len == 0 or operands.k_len == 0:
            return "flex_attention takes at least one query and one key"
        reasons = (_objection(part, operands) for part in variant.parts())
        return passed_over(variant, CARRIED) or next(filter(None, reasons), None)

    def attend(self, operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
        return by_group(operands, variant, lambda part, one: around(part, one, _attend))


def _objection(variant: Variant, operands: Operands) -> str | None:
    if variant.normalizer != SOFTMAX:
        return f"flex_attention knows softmax only, not `{variant.normalizer.name}`"
    if variant.dropout and operands.training:
        return "flex_attention has no dropout"
    if variant.empty_rows is not EmptyRows.ZERO and not every_query_sees_itself(operands, variant):
        return f"flex_attention gives zero to a query that sees nothing; asked for: {variant.empty_rows.value}"
    if variant.scale.mentions(e.q_norm, e.k_norm) or variant.score.mentions(e.q_norm, e.k_norm):
        return "a function of flex_attention sees a score, not the norms of q and k"
    return None


def _attend(operands: Operands, variant: Variant) -> Result:
    q, k, v = operands.q, operands.k, operands.v
    placed = _Placed.of(operands)
    score = variant.score.substitute({e.score: e.dot * variant.scale})
    blocks = None
    if variant.mask != e.true:
        seen = placed.function(variant.mask)
        blocks = flex.create_block_mask(
            lambda b, h, i, j: seen(b, b, h, i, j), q.shape[0], q.shape[1], q.shape[2], k.shape[2], device=str(q.device)
        )
    changed = None if score == e.dot else placed.function(score)
    out = _compiled()(q, k, v, score_mod=changed, block_mask=blocks, scale=1.0, enable_gqa=q.shape[1] != k.shape[1])
    return out, None


@cache
def _compiled() -> Callable[..., Any]:
    """flex_attention pays only where it is compiled."""
    return torch.compile(flex.flex_attention, dynamic=False)


class _Placed:
    """Prints expressions of one call over (score, b, h, i, j); a function closes over tables and the numbers of heads."""

    def __init__(self, known: Mapping[Expr, Expr], given: Mapping[str, Tensor]) -> None:
        self.known, self.given = known, given

    @classmethod
    def of(cls, operands: Operands) -> _Placed:
        given = dict(operands.tables)
        ratio = operands.heads // operands.kv_heads
        given["attn.heads"] = torch.tensor(operands.head_numbers, device=operands.q.device)
        number = e.table("attn.heads", e.h)
        known = {leaf: const(n) for leaf, n in operands.numbers().items() if isinstance(n, int)}
        known |= {e.h: number, e.kv: number // ratio}
        first, k_at = operands.first_query, operands.k_positions
        if isinstance(k_at, Tensor):
            given["attn.k"] = k_at
        known[e.k] = e.table("attn.k", e.b, e.h, PLACE) if isinstance(k_at, Tensor) else PLACE + int(k_at)
        if isinstance(operands.q_positions, Tensor):
            given["attn.q"] = operands.q_positions
        elif isinstance(k_at, Tensor):
            given["attn.q"] = k_at[..., operands.k_len - operands.q_len :]
        known[e.q] = e.table("attn.q", e.b, e.h, e.i) if first is None else e.i + int(first)
        return cls(known, given)

    def function(self, root: Expr) -> Callable[..., Tensor]:
        """`root` as a function of one pair of tokens."""
        placed = root.substitute(dict(self.known))
        names = sorted(placed.tables())
        tables = [f"t{n}" for n in range(len(names))]
        text = self._text(placed, dict(zip(names, tables, strict=True)))
        scope: dict[str, Any] = {"torch": torch}
        made = f"def make({', '.join(tables)}):\n    def of_pair(score, b, h, i, j):\n        return {text}\n    return of_pair\n"
        exec(made, scope)  # text of our own: numbers, operators and names of this file
        function: Callable[..., Tensor] = scope["make"](*(self.given[name] for name in names))
        return function

    def _text(self, node: Expr, tables: Mapping[str, str]) -> str:
        if node.op == "const":
            kind = {Sort.BOOL: "torch.bool", Sort.INDEX: "torch.int64"}.get(node.sort, "torch.float32")
            value = f'float("{node.value}")' if node.sort is Sort.REAL else repr(node.value)
            return f"torch.full_like(b, {value}, dtype={kind})"
        if node.op == "symbol":
            return _LEAVES[node]
        parts: Sequence[str] = [self._text(a, tables) for a in node.args]
        if node.op == "table":
            stored = self.given[str(node.value)]
            at = [f"({x}).clamp(0, {size - 1})" for x, size in zip(parts[len(parts) - stored.ndim :], stored.shape, strict=True)]
            return f"{tables[str(node.value)]}[{', '.join(at)}]"
        return _OPERATORS[node.op].format(*parts)
