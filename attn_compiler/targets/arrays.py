"""Evaluates expressions over torch tensors: nothing grows along a coordinate that an expression does not depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from attn_compiler.algebra.evaluate import PYTHON
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.errors import TableError
from attn_compiler.torch_private import statically_known_true

Number = bool | int | float | torch.SymInt
Value = Tensor | Number
_DTYPES = {Sort.INDEX: torch.int64, Sort.BOOL: torch.bool}


@dataclass(frozen=True)
class Arrays:
    """What the leaves of an expression stand for: numbers stay Python's, all else are tensors that broadcast.

    `whole` names the coordinates that count 0, 1, 2, … along an axis, which it numbers from the right (k: 1): a table read
    at them is a view, not a gather.
    """

    symbols: Mapping[Expr, Value]
    tables: Mapping[str, Tensor]
    real: torch.dtype
    device: torch.device
    whole: Mapping[Expr, int] = field(default_factory=dict)

    def read(self, expression: Expr, known: Mapping[Expr, Value] | None = None) -> Value:
        """What `expression` is, where the sub-expressions in `known` have been evaluated already."""
        done: dict[Expr, Value] = {**self.symbols, **(known or {})}
        for node in expression.walk():
            if node not in done:
                done[node] = self._evaluate(node, [done[a] for a in node.args])
        return done[expression]

    def tensor(self, value: Value, sort: Sort) -> Tensor:
        """`value` as a tensor of the dtype that `sort` has here; a number becomes one without axes."""
        dtype = _DTYPES.get(sort, self.real)
        if isinstance(value, Tensor):
            return value.to(dtype)
        return torch.full((), cast(float, value), dtype=dtype, device=self.device)

    def _evaluate(self, node: Expr, args: list[Value]) -> Value:
        if node.op == "const":
            assert not isinstance(node.value, str | None)
            return node.value
        if node.op == "symbol":
            raise TableError(f"nothing is known of `{node.value}` here")
        if node.op == "table":
            return self._table(node, args)
        symbolic = any(isinstance(x, torch.SymInt) for x in args)
        numbers = _SYMBOLIC_NUMBERS if symbolic else PYTHON
        if node.op not in numbers or (symbolic and node.sort is Sort.REAL) or any(isinstance(x, Tensor) for x in args):
            return self._compute(node, args)
        try:
            return numbers[node.op](*args)
        except (ArithmeticError, ValueError):  # 1 / 0, log(0): infinite or NaN in a tensor, an exception in Python
            return self._compute(node, args)

    def _compute(self, node: Expr, args: list[Value]) -> Tensor:
        sorts = [a.sort for a in node.args]
        operands = Sort.REAL if Sort.REAL in sorts or node.sort is Sort.REAL else Sort.INDEX
        tensors = [self.tensor(x, Sort.BOOL if s is Sort.BOOL else operands) for x, s in zip(args, sorts, strict=True)]
        return _TENSORS[node.op](*tensors)

    def _table(self, node: Expr, at: list[Value]) -> Tensor:
        name = str(node.value)
        if name not in self.tables:
            raise TableError(f'the table "{name}" is missing; given: {", ".join(sorted(self.tables)) or "none"}')
        stored = self.tables[name]
        if stored.ndim > len(at):
            raise TableError(
                f'the table "{name}" has {stored.ndim} axes, {list(stored.shape)}, but is read at {len(at)} coordinates'
            )
        inner = at[len(at) - stored.ndim :]
        values = self._view(stored, node.args[len(at) - stored.ndim :])
        if values is None:
            places = [self._within(x, size) for x, size in zip(inner, stored.shape, strict=True)]
            if any(place.ndim for place in places):  # traced, PyTorch forgets these axes beside an index that has none
                places = [place if place.ndim else place[None] for place in places]
            # Python's brackets would ask a tensor without axes for its number, which nobody knows while tracing.
            values = torch.ops.aten.index.Tensor(stored, places) if places else stored
        return self.tensor(values, node.sort)

    def _within(self, index: Value, size: int) -> Tensor:
        return self.tensor(index, Sort.INDEX).clamp(0, size - 1)

    def _view(self, stored: Tensor, at: Sequence[Expr]) -> Tensor | None:
        """The table itself, its axes moved to where the coordinates stand, where these just count along them."""
        places = [self.whole[x] for x in at if x in self.whole]
        if len(places) < len(at) or sorted(set(places), reverse=True) != places:
            return None
        shape: list[int] = [1] * max(places, default=0)
        for place, x, size in zip(places, at, stored.shape, strict=True):
            coordinate = self.symbols[x]
            assert isinstance(coordinate, Tensor)
            if not (statically_known_true(size == 1) or statically_known_true(size == coordinate.shape[-place])):
                return None
            shape[-place] = size
        return stored.reshape(shape)


def _least(a: Tensor, b: Tensor) -> Tensor:
    """Of equal numbers the first has the gradient, as everywhere else: a gate that is open stays as it is, min(log, 0)."""
    if not (a.is_floating_point() and torch.is_grad_enabled()):
        return torch.minimum(a, b)  # the same number, in one pass
    return torch.where((b < a) | b.isnan(), b, a)


# What symbolic sizes can do and stay symbolic; whatever else is asked of them is computed as a tensor without axes.
_SYMBOLIC_NUMBERS: Mapping[str, Callable[..., Number]] = {
    **{op: PYTHON[op] for op in ("add", "sub", "mul", "floordiv", "mod", "neg")},
    "min": torch.sym_min,
    "max": torch.sym_max,
}
_TENSORS: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "neg": torch.neg,
    "min": _least,
    "max": torch.maximum,
    "div": torch.div,
    "pow": torch.pow,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "real": lambda x: x,
    "ceil": lambda x: torch.ceil(x).to(torch.int64),
    "floor": lambda x: torch.floor(x).to(torch.int64),
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "where": torch.where,
}
