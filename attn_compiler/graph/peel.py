"""Takes repeats and plain factors off q, k and v: keys come once per head that owns them, and the scale is in the score."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from attn_compiler.graph.atom import Axes
from attn_compiler.graph.axes import Atoms, rearranges, repeats, source
from attn_compiler.graph.calls import call, is_number, is_tensor, shape
from attn_compiler.graph.mutation import Versions
from attn_compiler.graph.record import SCORE, Step

_LONGEST = 24
_FACTORS = ("mul", "div")
_CACHES = ("placed", "decoded")  # operators that stand for what a cache holds


@dataclass(frozen=True)
class Peeled:
    """The nodes from a root to the tensor that a product reads, with the axes of each; `factors` were multiplied on the way."""

    nodes: tuple[fx.Node, ...]
    axes: tuple[Axes, ...]
    readers: tuple[fx.Node, ...]  # who reads each node on this way
    factors: tuple[Step, ...]

    bare: int  # the place of the last node in front of every repeat and factor

    def extended(self, axes: Axes) -> Peeled:
        """The same, where the product itself repeats what it reads: there it has these axes."""
        return replace(
            self, nodes=(*self.nodes, self.nodes[-1]), axes=(*self.axes, axes), readers=(*self.readers, self.readers[-1])
        )


def peel(value: fx.Node, at: fx.Node, versions: Versions, atoms: Atoms, *, factors: bool) -> Peeled:
    """Walk back from `value`, as `at` reads it, through views, repeats and, if wanted, factors.

    A tensor that was filled through other views of its memory is read as it is: what defined it says nothing of its value.
    """
    nodes: list[fx.Node] = []
    readers: list[fx.Node] = []
    current: fx.Node | None = versions.read(value, at)
    if current is None:
        return _with_axes([value], [at], atoms)
    while current is not None and len(nodes) < _LONGEST:
        nodes.append(current)
        readers.append(at)
        at, current = current, _behind(current, versions, factors)
    nodes.reverse()
    readers.reverse()
    return _with_axes(nodes, readers, atoms)


def _behind(node: fx.Node, versions: Versions, factors: bool) -> fx.Node | None:
    if node.op != "call_function" or not is_tensor(node):
        return None
    if rearranges(node) or repeats(node):
        return versions.read(source(node), node)
    found = _factor(node) if factors else None
    return versions.read(found[0], node) if found else None


def _with_axes(nodes: list[fx.Node], readers: list[fx.Node], atoms: Atoms) -> Peeled:
    """Name the axes from the deepest root from which every view can be followed."""
    for start in range(len(nodes)):
        axes = [atoms.fresh(shape(nodes[start]))]
        for node in nodes[start + 1 :]:
            following = axes[-1] if _factor(node) else atoms.follow(node, axes[-1])
            if following is None:
                break
            axes.append(following)
        else:
            steps = tuple(found[1] for node in nodes[start + 1 :] if (found := _factor(node)))
            return Peeled(tuple(nodes[start:]), tuple(axes), tuple(readers[start:]), steps, _bare(nodes[start:]))
    raise AssertionError("the last node needs no view to be followed")


def _bare(nodes: list[fx.Node]) -> int:
    if call(nodes[0]).op in _CACHES:
        return 0  # that operator says what is there, which views of it do not
    changed = (place for place, node in enumerate(nodes[1:]) if repeats(node) or _factor(node) is not None)
    return next(changed, len(nodes) - 1)


def _factor(node: fx.Node) -> tuple[fx.Node, Step] | None:
    """A product with a number: the tensor, and the same step on the score."""
    read = call(node)
    if read.op not in _FACTORS or read.writes or read.get("rounding_mode") is not None:
        return None
    left, right = read["self"], read["other"]
    target = torch.ops.aten.mul.Tensor if read.op == "mul" else torch.ops.aten.div.Tensor
    if is_tensor(left) and not is_number(left) and is_number(right):
        return left, Step(target, {"self": SCORE, "other": right}, node)
    if read.op == "mul" and is_tensor(right) and not is_number(right) and is_number(left):
        return right, Step(target, {"self": SCORE, "other": left}, node)
    return None
