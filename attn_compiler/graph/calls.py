"""Reads a node of a captured graph: its canonical operation with arguments by name, and what is known of its value."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from attn_compiler import torch_private as private

Size = int | torch.SymInt
Argument = Any  # a node, a number, a list of those: what fx puts into `Node.args`

# Several ATen spellings of one operation; all others are known by their own name.
_SYNONYMS: Mapping[str, str] = {
    "bitwise_and": "and",
    "__and__": "and",
    "logical_and": "and",
    "bitwise_or": "or",
    "__or__": "or",
    "logical_or": "or",
    "bitwise_not": "not",
    "logical_not": "not",
    "bitwise_xor": "xor",
    "logical_xor": "xor",
    "multiply": "mul",
    "true_divide": "div",
    "divide": "div",
    "subtract": "sub",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "absolute": "abs",
    "negative": "neg",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "_unsafe_view": "view",
    "reshape": "view",
    "view_as": "view",
    "reshape_as": "view",
    "flatten": "view",
    "unflatten": "view",
    "_reshape_alias": "view",
    "mT": "transpose_last",
    "mH": "transpose_last",
    "adjoint": "transpose_last",
    "matrix_H": "transpose_last",
    "numpy_T": "transpose_all",
    "t": "transpose_all",
    "expand_as": "expand",
    "broadcast_to": "expand",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_to_copy": "cast",
    "to": "cast",
    "type_as": "cast",
    "_unsafe_index": "index",
    "constant_pad_nd": "pad",
    "contiguous": "same",
    "clone": "same",
    "alias": "same",
    "detach": "same",
    "lift_fresh": "same",
    "lift_fresh_copy": "same",
    "special_expit": "sigmoid",
    "arange_start": "arange",
}

_PYTHON: Mapping[Any, str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.floordiv: "floordiv",
    operator.mod: "mod",
    operator.neg: "neg",
    operator.pow: "pow",
    operator.getitem: "item",
}


@dataclass(frozen=True)
class Call:
    """A node's canonical operation and its arguments, by the names of the ATen schema, defaults filled in."""

    op: str
    arguments: Mapping[str, Argument]
    writes: bool = False  # the operation changes its first argument in place

    def __getitem__(self, name: str) -> Argument:
        return self.arguments[name]

    def get(self, name: str, default: Argument = None) -> Argument:
        return self.arguments.get(name, default)


def call(node: fx.Node) -> Call:
    """Name what `node` computes. Placeholders, attributes and outputs are operations of their own kind."""
    if node.op != "call_function":
        return Call(node.op, {})
    target = node.target
    if isinstance(target, private.Operator):
        return _aten(node, target)
    if target in _PYTHON:
        return Call(_PYTHON[target], dict(zip(("self", "other"), node.args, strict=False)))
    name = getattr(target, "__name__", str(target))
    positional = {str(i): argument for i, argument in enumerate(node.args)}
    return Call(name, {**positional, **node.kwargs})


def _aten(node: fx.Node, target: private.Operator) -> Call:
    names, defaults = _signature(target)
    arguments = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return Call(canonical(target), arguments, private.schema(target).is_mutable)


@cache
def _signature(target: private.Operator) -> tuple[tuple[str, ...], Mapping[str, Argument]]:
    """The names of an operator's arguments, and their defaults."""
    arguments = private.schema(target).arguments
    return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments if a.has_default_value()}


@cache
def canonical(target: private.Operator) -> str:
    """The one name for all spellings of an ATen operation, in place or not."""
    schema = private.schema(target)
    name = schema.name.split("::")[-1]
    if schema.is_mutable and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _SYNONYMS.get(name, name)


def value(x: Argument) -> Any:
    """What stands at `x` while tracing: a fake tensor, a symbolic number, or `x` itself."""
    return x.meta.get("val") if isinstance(x, fx.Node) else x


def is_tensor(x: Argument) -> bool:
    return isinstance(x, fx.Node) and isinstance(value(x), torch.Tensor)


def shape(x: Argument) -> tuple[Size, ...]:
    """The shape of a tensor's node."""
    tensor = value(x)
    assert isinstance(tensor, torch.Tensor), f"{x} is no tensor"
    return tuple(tensor.shape)


def dtype(x: Argument) -> torch.dtype | None:
    tensor = value(x)
    return tensor.dtype if isinstance(tensor, torch.Tensor) else None


def equal(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and private.formula(a) == private.formula(b):
        return True  # as most are; asking takes a hundred times as long
    return bool(private.statically_known_true(a == b))


def is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def is_number(x: Argument) -> bool:
    """A Python or symbolic number, or a tensor of one element."""
    seen = value(x)
    if isinstance(seen, torch.Tensor):
        return all(is_one(size) for size in seen.shape)
    return isinstance(seen, int | float | torch.SymInt | torch.SymFloat)
