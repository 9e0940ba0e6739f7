"""Reads operations that make tensors out of nothing, as arithmetic on indices."""

from __future__ import annotations

from torch import fx

from attn_compiler.algebra.expr import Expr, const, same
from attn_compiler.graph.calls import is_tensor, shape
from attn_compiler.graph.symbolic_reading import OpaqueError, Reading, Rule, Rules, cast


def _arange(r: Reading) -> Expr:
    start = r.reader.number(r.call.get("start") or 0)
    step = r.reader.number(1 if r.call.get("step") is None else r.call["step"])
    return cast(start + r.index[0] * step, r.dtype)


def _filled(value: int) -> Rule:
    return lambda r: cast(const(value), r.dtype)


def _full(r: Reading) -> Expr:
    value = r.call["fill_value"] if "fill_value" in r.call.arguments else r.call["value"]
    if isinstance(value, fx.Node) and is_tensor(value):
        return cast(r.at(value, (const(0),) * len(shape(value))), r.dtype)
    return cast(r.reader.number(value), r.dtype)


def _literal(r: Reading) -> Expr:
    """`torch.tensor([...])`: a choice by place, if it is short."""
    values = r.call.get("0", r.call.get("s"))
    for at in r.index:
        if not isinstance(values, list | tuple) or not at.is_const:
            raise OpaqueError
        values = values[int(at.value)]  # type: ignore[arg-type]
    if isinstance(values, list | tuple) or (isinstance(values, float) and values != values):
        raise OpaqueError
    return cast(r.reader.number(values), r.dtype)


def _eye(r: Reading) -> Expr:
    return cast(same(r.index[0], r.index[1]), r.dtype)


CREATION: Rules = {
    "arange": _arange,
    "zeros": _filled(0),
    "zeros_like": _filled(0),
    "new_zeros": _filled(0),
    "zero": _filled(0),
    "ones": _filled(1),
    "ones_like": _filled(1),
    "new_ones": _filled(1),
    "full": _full,
    "full_like": _full,
    "new_full": _full,
    "fill": _full,
    "scalar_tensor": _literal,
    "tensor": _literal,
    "as_tensor": _literal,
    "eye": _eye,
}
