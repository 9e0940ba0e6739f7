"""Decides whether two products with a softmax in between are an attention, by following atoms from q and k to the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.graph.atom import Axes, Axis, product
from attn_compiler.graph.axes import Atoms, quotient
from attn_compiler.graph.calls import call, dtype, equal, is_number, is_one, is_tensor, shape
from attn_compiler.graph.chain import Link, Path
from attn_compiler.graph.contraction import Contraction, Label, Side
from attn_compiler.graph.mutation import Versions
from attn_compiler.graph.names import module_path, source_line
from attn_compiler.graph.peel import Peeled, peel
from attn_compiler.graph.record import GraphSite, Operand, Step, StepArgument


class DisagreementError(Exception):
    """Why something is no attention, or none that can be moved; caught where candidates are tried."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{reason} ({node})")


@dataclass(frozen=True)
class Anchor:
    """A softmax, however it is written."""

    node: fx.Node
    score: fx.Node  # what is exponentiated
    dim: int  # counted from the end
    weights: fx.Node  # what leaves it: normalized, or to be divided by `mass` after the product with v
    computes_in: torch.dtype | None = None
    mass: fx.Node | None = None


@dataclass
class Binding:
    """One attempt to read an anchor and two paths as an attention."""

    anchor: Anchor
    before: Path
    behind: Path
    versions: Versions
    atoms: Atoms = field(default_factory=Atoms)
    shares_heads: bool = False  # the operator itself lets neighboring query heads share keys and values
    extra: int | None = None  # columns beside the keys
    sliced: bool = False

    def site(self) -> GraphSite:
        """Return the attention, or raise a `DisagreementError`."""
        qk, pv = self.before.product, self.behind.product
        left, right = self._peeled(qk.left, qk, factors=True), self._peeled(qk.right, qk, factors=True)
        right = self._shared(right, left) if self.shares_heads else right
        scores = self._joined(qk, left.axes[-1], right.axes[-1])
        steps, axes = self._through(self.before.links, qk.steps, self._placed(qk.out, scores))
        keys = axes[self._key_place(axes)]
        k_side = self._side_of(keys, qk, scores)
        q_side = qk.left if k_side is qk.right else qk.right
        after, axes = self._through(self.behind.links, pv.steps, axes)
        if self.extra is not None and not self.sliced:
            raise DisagreementError(self.anchor.node, "columns beside the keys are not dropped after the softmax")
        p_side, v_side = self._weights_side(pv)
        v = self._peeled(v_side, pv, factors=False)
        v = self._shared(v, left) if self.shares_heads else v
        sides = (axes, v.axes[-1]) if p_side is pv.left else (v.axes[-1], axes)
        outs = self._joined(pv, *sides)
        if len(pv.summed) != 1 or not self._same(axes[p_side.labels.index(pv.summed[0])], keys):
            raise DisagreementError(pv.node, "the product with v does not sum over the axis of the softmax")
        q, k = (left, right) if q_side is qk.left else (right, left)
        self._check_parameters(k, v)
        batch, heads, queries = self._groups(qk, q_side, scores)
        width = tuple(atom for label in pv.free(v_side) for atom in outs[label])
        depth = tuple(atom for label in qk.summed for atom in scores[label])
        if len(qk.summed) != 1 or not pv.free(v_side):
            raise DisagreementError(qk.node, "q and k are not contracted over one axis")
        out = self._out()
        found = GraphSite(
            "softmax", self.anchor.node, Operand(out, self._placed(pv.out, outs)),
            self._operand(q), self._operand(k), self._operand(v),
            batch, heads, queries, keys, depth, width,
            (*left.factors, *right.factors, *steps), after,
            extra=self.extra, product_dtype=dtype(qk.node), softmax_dtype=self.anchor.computes_in, name=module_path(out),
            where=source_line(out),
        )  # fmt: skip
        return settled(self._sharing(found, k, v), self.atoms, self.versions, (q, k, v))

    def _peeled(self, side: Side, of: Contraction, *, factors: bool) -> Peeled:
        return peel(side.node, of.node, self.versions, self.atoms, factors=factors)

    def _shared(self, keys: Peeled, queries: Peeled) -> Peeled:
        """Keys as if repeated for every query head: [..., heads, tokens, dim]."""
        wanted, axes = product(queries.axes[-1][-3]), keys.axes[-1]
        times = self.atoms.repeat(quotient(wanted, product(axes[-3])))
        return keys.extended((*axes[:-3], (*axes[-3], times), *axes[-2:]))

    def _joined(self, of: Contraction, left: Axes, right: Axes) -> Mapping[Label, Axis]:
        axes = of.join(self.atoms, left, right)
        if axes is None:
            raise DisagreementError(of.node, "the axes of the two factors do not fit")
        return axes

    def _placed(self, labels: tuple[Label, ...], axes: Mapping[Label, Axis]) -> Axes:
        return tuple(axes[label] for label in labels)

    def _through(self, links: tuple[Link, ...], given: tuple[Step, ...], axes: Axes) -> tuple[tuple[Step, ...], Axes]:
        """Follow the axes along a path; a step's tensors get the axes that they are broadcast against."""
        steps: list[Step] = []
        for link in links:
            if isinstance(link, Step):
                if link not in given and link.op == "cat":
                    self._beside(link, axes)
                elif link not in given:
                    self._check_shape(link.node, axes)
                steps.append(replace(link, arguments={n: self._attached(x, link, axes) for n, x in link.arguments.items()}))
            elif call(link).op == "slice":
                self._drop_columns(link, axes)
            else:
                following = self.atoms.follow(link, axes)
                if following is None:
                    raise DisagreementError(link, "a view of the scores cannot be followed")
                axes = following
        return tuple(steps), axes

    def _check_shape(self, node: fx.Node, axes: Axes) -> None:
        sizes = shape(node)
        for place, axis in enumerate(axes):
            beside = self.extra if place == self._key_place(axes) and self.extra and not self.sliced else 0
            if len(sizes) != len(axes) or not equal(sizes[place], product(axis) + beside):
                raise DisagreementError(node, "an operand is larger than the scores")

    def _key_place(self, axes: Axes) -> int:
        return self.anchor.dim % len(axes)

    def _beside(self, step: Step, axes: Axes) -> None:
        others = [x for x in _flat(step.arguments["tensors"]) if isinstance(x, fx.Node)]
        place = self._key_place(axes)
        width = shape(others[0])[place] if len(shape(others[0])) == len(axes) else None
        if step.arguments["dim"] not in (place, place - len(axes)) or not isinstance(width, int) or self.extra is not None:
            raise DisagreementError(step.node, "the scores are concatenated with something that is no column beside the keys")
        self.extra = width

    def _drop_columns(self, node: fx.Node, axes: Axes) -> None:
        """Only the columns that were put beside the keys may go after the softmax."""
        if self.extra is None or call(node)["dim"] % len(axes) != self._key_place(axes):
            raise DisagreementError(node, "a part of the weights is cut off")
        front = any(step.op == "cat" and _flat(step.arguments["tensors"])[1:] and _hole_last(step) for step in self._raw_steps())
        start = call(node)["start"] or 0
        if not equal(shape(node)[self._key_place(axes)], product(axes[self._key_place(axes)])) or start != (
            self.extra if front else 0
        ):
            raise DisagreementError(node, "the weights that are cut off are not those beside the keys")
        self.sliced = True

    def _raw_steps(self) -> list[Step]:
        return [link for link in self.before.links if isinstance(link, Step)]

    def _attached(self, value: StepArgument, step: Step, axes: Axes) -> StepArgument:
        if isinstance(value, tuple | list):
            return tuple(self._attached(x, step, axes) for x in value)  # type: ignore[misc]
        if not isinstance(value, fx.Node) or not is_tensor(value):
            return value
        node = self.versions.read(value, step.node) or value
        if is_number(node) and step.op != "cat":
            return node
        sizes = shape(node)
        if step.op == "cat":
            axes = tuple(() if place == self._key_place(axes) else axis for place, axis in enumerate(axes))
        aligned = axes[len(axes) - len(sizes) :]
        return Operand(node, tuple(() if is_one(size) else axis for size, axis in zip(sizes, aligned, strict=True)))

    def _same(self, a: Axis, b: Axis) -> bool:
        return self._visible(a) == self._visible(b)

    def _visible(self, axis: Axis) -> Axis:
        return tuple(atom for atom in self.atoms.resolve(axis) if not atom.is_unit)

    def _side_of(self, keys: Axis, qk: Contraction, scores: Mapping[Label, Axis]) -> Side:
        """The factor that the axis of the softmax belongs to: the keys."""
        for side, other in ((qk.right, qk.left), (qk.left, qk.right)):
            free = qk.free(side)
            if len(free) == 1 and qk.free(other) and self._same(scores[free[0]], keys):
                return side
        raise DisagreementError(self.anchor.node, "the softmax does not run over an axis that only one factor of the scores has")

    def _weights_side(self, pv: Contraction) -> tuple[Side, Side]:
        return (pv.left, pv.right) if pv.left.node is self.behind.last else (pv.right, pv.left)

    def _groups(self, qk: Contraction, q_side: Side, scores: Mapping[Label, Axis]) -> tuple[Axis, Axis, Axis]:
        """Sort what is neither key nor depth into batch, heads and queries."""
        shared, free = [self.atoms.resolve(scores[label]) for label in qk.shared], qk.free(q_side)
        queries = scores[free[-1]]
        grouped = tuple(atom for label in free[:-1] for atom in scores[label])
        if grouped:
            split = min(1, len(shared))
        elif len(shared) == 1:
            return shared[0][:1], shared[0][1:], queries
        else:
            split = max(len(shared) - 1, 0)
        return sum(shared[:split], ()), sum(shared[split:], ()) + grouped, queries

    def _out(self) -> fx.Node:
        """The product with v, or its division by the mass that was left for later."""
        node = self.behind.product.node
        if self.anchor.mass is None:
            return node
        divisions = [u for u in node.users if call(u).op == "div" and call(u)["other"] is self.anchor.mass]
        if len(node.users) != 1 or len(divisions) != 1:
            raise DisagreementError(node, "exponentials are multiplied with v, but not divided by their sum")
        return divisions[0]

    def _check_parameters(self, k: Peeled, v: Peeled) -> None:
        if private.is_parameter(k.nodes[0]) and private.is_parameter(v.nodes[0]):
            raise DisagreementError(k.nodes[0], "keys and values are parameters: a lookup, no attention")

    def _operand(self, found: Peeled) -> Operand:
        return Operand(found.nodes[found.bare], found.axes[found.bare])

    def _sharing(self, site: GraphSite, k: Peeled, v: Peeled) -> GraphSite:
        """Keys and values without repeats, where both repeat alike and the heads that share one are neighbors."""
        heads = self._visible(site.heads)
        own = [tuple(a for axis in x.axes for a in self._visible(axis) if a in heads) for x in (site.k, site.v)]
        if own[0] == own[1] == heads[: len(own[0])]:
            return site
        return replace(site, k=Operand(k.nodes[-1], k.axes[-1]), v=Operand(v.nodes[-1], v.axes[-1]))


def settled(site: GraphSite, atoms: Atoms, versions: Versions, peeled: tuple[Peeled, Peeled, Peeled]) -> GraphSite:
    """The same site in atoms that nothing splits any more; refused where an operand changes before the output is computed."""
    batch, heads, queries, keys, depth, width = (
        atoms.resolve(group) for group in (site.batch, site.heads, site.queries, site.keys, site.depth, site.width)
    )
    known = {*batch, *heads, *queries, *keys, *depth, *width}

    def settle(operand: Operand) -> Operand:
        axes = tuple(atoms.resolve(axis) for axis in operand.axes)
        strange = [atom for axis in axes for atom in axis if atom not in known and not atom.is_unit]
        if strange:
            raise DisagreementError(operand.node, "an axis of an operand has no place among batch, heads, queries and keys")
        return Operand(operand.node, tuple(tuple(atom for atom in axis if atom in known) for axis in axes))

    def settle_argument(value: StepArgument) -> StepArgument:
        if isinstance(value, tuple):
            return tuple(settle_argument(x) for x in value)  # type: ignore[misc]
        return settle(value) if isinstance(value, Operand) else value

    def settle_steps(steps: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple(replace(s, arguments={n: settle_argument(x) for n, x in s.arguments.items()}) for s in steps)

    steps, after = settle_steps(site.steps), settle_steps(site.after)
    for operand, way in zip((site.q, site.k, site.v), peeled, strict=True):
        reader = way.readers[way.nodes.index(operand.node)]
        if not versions.holds(operand.node, reader, site.out.node):
            raise DisagreementError(operand.node, "an operand is written between its use and the product with v")
    q, k, v, out = (settle(x) for x in (site.q, site.k, site.v, site.out))
    site = replace(site, batch=batch, heads=heads, queries=queries, keys=keys, depth=depth, width=width)
    return replace(site, q=q, k=k, v=v, out=out, steps=steps, after=after)


def _flat(value: StepArgument) -> tuple[StepArgument, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _hole_last(step: Step) -> bool:
    return not isinstance(_flat(step.arguments["tensors"])[-1], fx.Node)


def computing_dtype(node: fx.Node) -> torch.dtype | None:
    """What a softmax computes in: its own argument, or the type of its input."""
    chosen = call(node).get("dtype")
    return chosen if isinstance(chosen, torch.dtype) else dtype(node)
