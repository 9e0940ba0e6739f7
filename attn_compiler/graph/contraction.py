"""Products of two tensors, whatever they are called, as labels: which dimensions are shared, summed and kept."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import fx

from attn_compiler.graph.atom import Axes, Axis
from attn_compiler.graph.axes import Atoms
from attn_compiler.graph.calls import Call, call, is_tensor, shape
from attn_compiler.graph.record import SCORE, Step

Label = Hashable
aten = torch.ops.aten


@dataclass(frozen=True)
class Side:
    """One factor: the tensor and a label for each of its dimensions."""

    node: fx.Node
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Contraction:
    """`out = sum over labels missing there of (left * right)`, then `steps`."""

    node: fx.Node
    left: Side
    right: Side
    out: tuple[Label, ...]
    steps: tuple[Step, ...] = ()

    @property
    def summed(self) -> tuple[Label, ...]:
        return tuple(x for x in self.left.labels if x in self.right.labels and x not in self.out)

    def free(self, side: Side) -> tuple[Label, ...]:
        """What only this side has."""
        other = self.right if side is self.left else self.left
        return tuple(x for x in self.out if x in side.labels and x not in other.labels)

    @property
    def shared(self) -> tuple[Label, ...]:
        return tuple(x for x in self.out if x in self.left.labels and x in self.right.labels)

    def join(self, atoms: Atoms, left: Axes, right: Axes) -> dict[Label, Axis] | None:
        """Give each label its axis; None if the two sides do not fit."""
        axes: dict[Label, Axis] = dict(zip(self.left.labels, left, strict=True))
        for label, axis in zip(self.right.labels, right, strict=True):
            mine = axes.setdefault(label, axis)
            if mine is axis or (_is_unit(axis) and not _is_unit(mine)):
                continue
            if _is_unit(mine) and not _is_unit(axis):
                axes[label] = axis
            elif not atoms.unify(mine, axis):
                return None
        return axes


def _is_unit(axis: Axis) -> bool:
    return all(atom.is_unit for atom in axis)


def contraction(node: fx.Node) -> Contraction | None:
    """Read `node` as a product of two tensors, or None."""
    read = call(node)
    if read.op == "einsum":
        return _einsum(node, read)
    if read.op == "baddbmm":
        return _baddbmm(node, read)
    if read.op not in ("matmul", "bmm", "mm"):
        return None
    a, b = node.args[0], node.args[1]
    return _product(node, a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _product(node: fx.Node, a: fx.Node, b: fx.Node, steps: tuple[Step, ...] = ()) -> Contraction | None:
    if not (is_tensor(a) and is_tensor(b)) or min(len(shape(a)), len(shape(b))) < 2:
        return None
    rank = max(len(shape(a)), len(shape(b))) - 2
    outer: tuple[Label, ...] = tuple(range(rank))

    def labels(x: fx.Node, *last: Label) -> tuple[Label, ...]:
        return (*outer[rank - (len(shape(x)) - 2) :], *last)

    return Contraction(node, Side(a, labels(a, "i", "d")), Side(b, labels(b, "d", "j")), (*outer, "i", "j"), steps)


def _baddbmm(node: fx.Node, read: Call) -> Contraction | None:
    alpha, beta = read["alpha"], read["beta"]
    steps = []
    if alpha != 1 or isinstance(alpha, fx.Node):
        steps.append(Step(aten.mul.Tensor, {"self": SCORE, "other": alpha}, node))
    if beta != 0:  # with zero, torch does not even look at the tensor
        steps.append(Step(aten.add.Tensor, {"self": SCORE, "other": read["self"], "alpha": beta}, node))
    return _product(node, read["batch1"], read["batch2"], tuple(steps))


def _einsum(node: fx.Node, read: Call) -> Contraction | None:
    equation, tensors = str(read["equation"]).replace(" ", ""), read["tensors"]
    if len(tensors) != 2:
        return None
    inputs, arrow, result = equation.partition("->")
    if not arrow:
        letters = sorted(x for x in set(inputs) if x.isalpha() and inputs.count(x) == 1)
        result = ("..." if "..." in inputs else "") + "".join(letters)
    written = inputs.split(",")
    hidden = [
        len(shape(x)) - len(text.replace("...", "")) if "..." in text else 0 for text, x in zip(written, tensors, strict=True)
    ]
    left, right = (_labels(text, rank) for text, rank in zip(written, hidden, strict=True))
    if len(set(left)) < len(left) or len(set(right)) < len(right):
        return None
    return Contraction(node, Side(tensors[0], left), Side(tensors[1], right), _labels(result, max(hidden)))


def _labels(text: str, hidden: int) -> tuple[Label, ...]:
    """One label per dimension; those under an ellipsis are counted from its end, as broadcasting aligns them."""
    before, dots, after = text.partition("...")
    return (*before, *(range(-hidden, 0) if dots else ()), *after)
