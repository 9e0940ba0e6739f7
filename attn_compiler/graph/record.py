"""What the matcher found: one attention of a graph, as operands, a score program, and the way back into the graph.

Every axis is made of atoms (`attn_compiler.graph.atom`). A site sorts the atoms of its scores into four groups, `batch`,
`heads`, `queries` and `keys`; together with `depth` (what q and k are contracted over) and `width` (the columns of v) they
say how each tensor is laid out:

    q  [batch, heads, queries, depth]         k  [batch, kv_heads, keys, depth]
    o  [batch, heads, queries, width]         v  [batch, kv_heads, keys, width]

A score's operand keeps the layout its model gave it: `Operand.axes` names the atoms of each of its dimensions, and
`GraphSite.at` turns such a dimension into an expression over `b h i k` (`i`: a query's index in this call).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

import torch
from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.algebra.expr import Expr, b, const, h, i, k
from attn_compiler.graph.atom import Atom, Axes, Axis, coordinates, product
from attn_compiler.graph.calls import Size, canonical


class Hole(Enum):
    """Stands in a step's arguments for the value that flows from the contraction of q and k to the weights."""

    SCORE = "score"


SCORE: Final = Hole.SCORE


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph, with the atoms of each of its dimensions; a dimension of size 1 that is broadcast has none."""

    node: fx.Node
    axes: Axes


Value = Hole | Operand | fx.Node | torch.dtype | bool | int | float | str | None
StepArgument = Value | tuple[Value, ...]


@dataclass(frozen=True)
class Step:
    """One operation on the score: an ATen operator whose arguments hold `SCORE` once; views are not steps.

    `target` is pointwise or one of: a cast (`op == "cast"`; the new type is `dtype`), dropout (`p`, `train`), and `cat`
    along the keys (`tensors`: `SCORE` and the `Operand` that is put before or behind it).
    An argument is `SCORE`, an `Operand` (a tensor that is broadcast against the scores), an `fx.Node` that is a number (a
    symbolic size or a Python float that is an input), or a constant. Names are those of the operator's schema.
    """

    target: private.Operator
    arguments: Mapping[str, StepArgument]
    node: fx.Node  # where it was found: provenance, and the type of its result

    @property
    def op(self) -> str:
        """The canonical name, as `graph.calls.call` would give it."""
        return "cast" if "dtype" in self.arguments and "pointwise" not in self.tags else canonical(self.target)

    @property
    def tags(self) -> frozenset[str]:
        return frozenset(tag.name for tag in self.target.tags)

    def run(self, value: Callable[[StepArgument], object]) -> torch.Tensor:
        """Compute this step, each argument being what `value` makes of it."""
        arguments = private.schema(self.target).arguments
        given = {a.name: value(self.arguments[a.name]) for a in arguments if a.name in self.arguments}
        named = {a.name: given.pop(a.name) for a in arguments if a.kwarg_only and a.name in given}
        return self.target(*given.values(), **named)  # type: ignore[no-any-return]

    def operands(self) -> tuple[Operand, ...]:
        """The tensors this reads besides the score."""
        flat = [x for value in self.arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
        return tuple(x for x in flat if isinstance(x, Operand))


@dataclass(frozen=True)
class GraphSite:
    """One attention: `out = rearranged(after(normalize(steps(q · k))) · v)`, where `normalize` is a softmax over the keys."""

    idiom: Literal["softmax", "sdpa", "flex"]
    anchor: fx.Node  # the softmax (or the exponential of a hand-written one), the SDPA call, the flex operator
    out: Operand  # the node to be replaced: reading `axes` in order, its dimensions
    q: Operand
    k: Operand
    v: Operand
    batch: Axis
    heads: Axis
    queries: Axis
    keys: Axis
    depth: Axis
    width: Axis
    steps: tuple[Step, ...]  # from the contraction to the softmax, in order
    after: tuple[Step, ...]  # from the softmax to the contraction with v: dropout, casts, zeroing masks
    causal: bool = False  # SDPA's own flag: query `i` sees keys `k <= i`, applied after `steps`
    extra: int | None = None  # columns that a step `cat` put beside the keys and that are dropped after the softmax
    empty_rows_are_zero: bool = False  # SDPA's softmax; a plain one gives NaN where every score is -inf
    product_dtype: torch.dtype | None = None  # what q·k is computed in; None: what `out` is held in
    softmax_dtype: torch.dtype | None = None  # what the softmax computes in
    escapes: tuple[fx.Node, ...] = ()  # others that read scores or weights
    name: str = ""  # `model.layers.3.self_attn`
    where: str = ""  # file and line

    @property
    def kv_heads(self) -> Axis:
        """The atoms of `heads` that keys or values depend on."""
        own = {atom for operand in (self.k, self.v) for axis in operand.axes for atom in axis}
        return tuple(atom for atom in self.heads if atom in own)

    @property
    def lengths(self) -> tuple[Size, Size]:
        """How many queries meet how many keys."""
        return product(self.queries), product(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        """What the products are computed in: under autocast not what q is held in."""
        return self.product_dtype or self.out.node.meta["val"].dtype

    @property
    def dropout(self) -> float:
        """The probability that is active while this graph runs."""
        found = [step.arguments for step in self.after if step.op == "dropout" and step.arguments["train"]]
        return float(found[0]["p"]) if found else 0.0  # type: ignore[arg-type]

    def places(self) -> dict[Atom, Expr]:
        """Each atom of the scores as an expression over `b h i k`; one that a symbolic size hides is missing."""
        groups = ((self.batch, b), (self.heads, h), (self.queries, i), (self.keys, k))
        return {atom: at for group, index in groups for atom, at in coordinates(group, index).items()}

    def at(self, axis: Axis) -> Expr | None:
        """Where a dimension made of these atoms is read, over `b h i k`; None where a symbolic size hides it."""
        places, index = self.places(), const(0)
        for atom in (atom for atom in axis if not atom.is_unit):
            if atom not in places:
                return None
            if index == const(0):
                index = places[atom]
            elif isinstance(atom.size, int):
                index = index * atom.size + places[atom]
            else:
                return None
        return index
