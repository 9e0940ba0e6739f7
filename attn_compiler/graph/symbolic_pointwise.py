"""Reads operations that work on each place alone: arithmetic, comparisons, logic, choices and casts."""

from __future__ import annotations

import torch

from attn_compiler.algebra.expr import Expr, Sort, const, same, where
from attn_compiler.graph.symbolic_reading import (
    OpaqueError,
    Reading,
    Rule,
    Rules,
    as_bool,
    as_number,
    cast,
    combine,
    is_exact,
)

# Narrower integers wrap around.
_WIDE = (torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool)


def _two(r: Reading) -> tuple[Expr, Expr]:
    """Both operands, in the type the operation computes in."""
    return r.operand(r.call["self"]), r.operand(r.call["other"])


def _arithmetic(op: str) -> Rule:
    def rule(r: Reading) -> Expr:
        if r.dtype not in _WIDE:
            raise OpaqueError
        a, b = _two(r)
        alpha = r.call.get("alpha", 1)
        if not (isinstance(alpha, int | float) and alpha == 1):
            b = combine("mul", b, r.reader.number(alpha))
        if r.dtype is torch.bool:
            return {"add": a | b, "mul": a & b}[op] if op in ("add", "mul") and a.sort is b.sort else _refuse()
        return cast(combine(op, a, b), r.dtype)

    return rule


def _refuse() -> Expr:
    raise OpaqueError


def _div(r: Reading) -> Expr:
    a, b = map(as_number, _two(r))
    rounding = r.call.get("rounding_mode")
    if rounding is None:
        return cast(combine("div", a, b), r.dtype)
    if rounding == "floor":
        return _floordiv(r)
    raise OpaqueError


def _floordiv(r: Reading) -> Expr:
    return _whole_numbers("floordiv", r)


def _mod(r: Reading) -> Expr:
    return _whole_numbers("mod", r)


def _whole_numbers(op: str, r: Reading) -> Expr:
    a, b = map(as_number, _two(r))
    if a.sort is not Sort.INDEX or b.sort is not Sort.INDEX or not b.is_const or b.value == 0:
        raise OpaqueError
    return combine(op, a, b)


def _comparison(op: str, swap: bool = False, negate: bool = False) -> Rule:
    def rule(r: Reading) -> Expr:
        a, b = _two(r)
        if op == "eq" and a.sort is b.sort is Sort.BOOL:
            result = same(a, b)
        else:
            a, b = as_number(a), as_number(b)
            if not (is_exact(a) and is_exact(b)):
                raise OpaqueError  # rounding decides where two reals nearly meet
            result = combine(op, b, a) if swap else combine(op, a, b)
        return ~result if negate else result

    return rule


def _logic(op: str) -> Rule:
    def rule(r: Reading) -> Expr:
        a, b = _two(r)
        if r.dtype is not torch.bool:
            raise OpaqueError
        return combine(op, as_bool(a), as_bool(b))

    return rule


def _not(r: Reading) -> Expr:
    if r.dtype is not torch.bool:
        raise OpaqueError
    return ~as_bool(r.operand(r.call["self"]))


def _xor(r: Reading) -> Expr:
    if r.dtype is not torch.bool:
        raise OpaqueError
    a, b = _two(r)
    return ~same(as_bool(a), as_bool(b))


def _unary(op: str) -> Rule:
    def rule(r: Reading) -> Expr:
        x = as_number(r.operand(r.call["self"]))
        if x.sort is Sort.INDEX and op in ("floor", "ceil"):
            return x
        if op in ("floor", "ceil") and not is_exact(x):
            raise OpaqueError
        return cast(combine(op, x), r.dtype)

    return rule


def _reciprocal(r: Reading) -> Expr:
    return cast(combine("div", 1.0, as_number(r.operand(r.call["self"]))), r.dtype)


def _rsub(r: Reading) -> Expr:
    if r.call.get("alpha", 1) != 1:
        raise OpaqueError
    a, b = _two(r)
    return cast(combine("sub", b, a), r.dtype)


def _rsqrt(r: Reading) -> Expr:
    return cast(combine("div", 1.0, combine("sqrt", as_number(r.operand(r.call["self"])))), r.dtype)


def _pow(r: Reading) -> Expr:
    base, exponent = as_number(r.operand(r.call["self"])), as_number(r.operand(r.call["exponent"]))
    if r.dtype not in _WIDE or not r.dtype.is_floating_point:
        raise OpaqueError
    return cast(combine("pow", base, exponent), r.dtype)


def _where(r: Reading) -> Expr:
    condition = as_bool(r.operand(r.call["condition"]))
    yes, no = (cast(r.operand(r.call[name]), r.dtype) for name in ("self", "other"))
    return where(condition, yes, no)


def _masked_fill(r: Reading) -> Expr:
    condition, kept = as_bool(r.operand(r.call["mask"])), r.operand(r.call["self"])
    return where(condition, cast(r.operand(r.call["value"]), r.dtype), cast(kept, r.dtype))


def _clamp(r: Reading) -> Expr:
    x = as_number(r.operand(r.call["self"]))
    for name, op in (("min", "max"), ("max", "min")):
        if r.call.get(name) is not None:
            x = combine(op, x, as_number(r.operand(r.call[name])))
    return cast(x, r.dtype)


def _extreme(op: str) -> Rule:
    def rule(r: Reading) -> Expr:
        if "dim" in r.call.arguments or "other" not in r.call.arguments:
            raise OpaqueError
        return cast(combine(op, *map(as_number, _two(r))), r.dtype)

    return rule


def _cast(r: Reading) -> Expr:
    return cast(r.at(r.tensor("self"), r.index), r.dtype)


def _copied(r: Reading) -> Expr:
    return cast(r.operand(r.call["src"]), r.dtype)


def _sign(r: Reading) -> Expr:
    x = as_number(r.operand(r.call["self"]))
    one = const(1) if x.sort is Sort.INDEX else const(1.0)
    if not is_exact(x):
        raise OpaqueError
    return where(x > 0, one, where(x < 0, combine("neg", one), combine("sub", one, one)))


POINTWISE: Rules = {
    **{op: _arithmetic(op) for op in ("add", "sub", "mul")},
    **{op: _unary(op) for op in ("neg", "abs", "exp", "log", "sqrt", "tanh", "sigmoid", "floor", "ceil")},
    "rsub": _rsub,
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": _pow,
    "reciprocal": _reciprocal,
    "rsqrt": _rsqrt,
    "lt": _comparison("lt"),
    "le": _comparison("le"),
    "gt": _comparison("lt", swap=True),
    "ge": _comparison("le", swap=True),
    "eq": _comparison("eq"),
    "ne": _comparison("eq", negate=True),
    "and": _logic("and"),
    "or": _logic("or"),
    "xor": _xor,
    "not": _not,
    "where": _where,
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "minimum": _extreme("min"),
    "maximum": _extreme("max"),
    "min": _extreme("min"),
    "max": _extreme("max"),
    "sign": _sign,
    "cast": _cast,
    "copy": _copied,
}
