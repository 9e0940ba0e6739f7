"""Walks from a softmax backwards to a product of q and k, and forwards to the product with v, through steps and views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.graph.axes import rearranges, source
from attn_compiler.graph.calls import Call, call, dtype, is_number, is_tensor, shape
from attn_compiler.graph.contraction import Contraction, contraction
from attn_compiler.graph.mutation import Versions
from attn_compiler.graph.record import SCORE, Step

Link = fx.Node | Step  # a view, or a step whose tensors are still nodes

_LONGEST = 40
_MOST_VISITED = 300
_POINTWISE = frozenset(("where", "masked_fill", "mul", "sub", "div", "add", "clamp"))  # some overloads lack torch's tag


@dataclass(frozen=True)
class Path:
    """Links in the order of the data flow, from or to a product of two tensors. Paths are tried by `cost`, cheapest first."""

    links: tuple[Link, ...]
    product: Contraction
    cost: int = 0
    last: fx.Node | None = None  # forwards: the node whose value enters the product

    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(link.node if isinstance(link, Step) else link for link in self.links)


@dataclass
class Walk:
    """A search through one graph; `blocked` keeps the first node it could not pass, and why."""

    versions: Versions
    axis: int  # of the softmax, counted from the end
    visited: int = 0
    blocked: tuple[fx.Node, str] | None = None

    def backwards(self, value: fx.Node, at: fx.Node, depth: int = 0) -> Iterator[Path]:
        """Yield the paths on which `value`, as `at` reads it, comes from a product."""
        self.visited += 1
        node = self.versions.read(value, at)
        if node is None:
            self._stop(value, "it is written through another view of its memory before the softmax reads it")
            return
        if node.op != "call_function" or depth > _LONGEST or self.visited > _MOST_VISITED:
            self._stop(value)
            return
        product = contraction(node)
        if product is not None:
            yield Path(product.steps, product)
            return
        read = call(node)
        if rearranges(node):
            links = () if read.op in ("same", "slice", "cast") else (node,)
            yield from self._extend(source(node), node, links, 0, depth)
        elif (read.op == "dropout" and not (read["train"] and read["p"])) or self._subtracts_row_maximum(node, read):
            yield from self._extend(source(node), node, (), 0, depth)
        else:
            yield from self._through_steps(node, read, depth)

    def _through_steps(self, node: fx.Node, read: Call, depth: int) -> Iterator[Path]:
        found = False
        for cost, (value, step) in enumerate(steps_of(node, read)):
            found = True
            yield from self._extend(value, node, (step,), cost + 2 * (read.op == "cat"), depth)
        if not found:
            self._stop(node)

    def _stop(self, node: fx.Node, reason: str = "no product of two tensors leads to the softmax") -> None:
        self.blocked = self.blocked or (node, reason)

    def _extend(self, value: fx.Node, at: fx.Node, links: tuple[Link, ...], cost: int, depth: int) -> Iterator[Path]:
        for path in self.backwards(value, at, depth + 1):
            yield replace(path, links=path.links + links, cost=path.cost + cost)

    def _subtracts_row_maximum(self, node: fx.Node, read: Call) -> bool:
        """Softmax does not notice a shift of a row, such as the one that keeps the exponential small."""
        other = read.get("other")
        if read.op != "sub" or read.get("alpha", 1) != 1 or not isinstance(other, fx.Node):
            return False
        while rearranges(other) or "detach" in str(other.target):
            other = source(other)
        found = call(other)
        if found.op == "item" and found["other"] == 0:
            other = source(other)
            found = call(other)
        if found.op not in ("amax", "max", "logsumexp") or not found.get("keepdim"):
            return False
        dims = found["dim"] if isinstance(found["dim"], list | tuple) else [found["dim"]]
        mine = self.versions.read(source(node), node)
        rank = len(shape(node))
        return self.versions.read(source(other), other) is mine and [d % rank - rank for d in dims] == [self.axis]

    def forwards(self, value: fx.Node, depth: int = 0) -> Iterator[Path]:
        """Yield the paths on which `value` enters a product."""
        if depth > _LONGEST:
            return
        for user in self._readers(value):
            product = contraction(user)
            if product is not None:
                yield Path((), product, last=value)
            elif is_tensor(user):
                yield from self._onwards(value, user, depth)

    def _readers(self, value: fx.Node) -> list[fx.Node]:
        """All calls that see this value, also under the name of a tensor that it was written into."""
        names = [value]
        while call(names[-1]).writes and isinstance(into := names[-1].args[0], fx.Node):
            names.append(into)
        users = [user for name in names for user in name.users if user.op == "call_function"]
        seen = [(user, {self.versions.read(name, user) for name in names if user in name.users}) for user in users]
        return [user for user, values in seen if value in values]

    def _onwards(self, value: fx.Node, user: fx.Node, depth: int) -> Iterator[Path]:
        read = call(user)
        links: tuple[Link, ...] | None = None
        if rearranges(user):
            links = () if read.op in ("same", "slice", "cast") else (user,)
        elif read.op == "dropout":
            active = read["train"] and read["p"]
            links = (Step(_overload(user), {**read.arguments, "input": SCORE}, user),) if active else ()
        elif read.op == "slice":
            links = (user,)
        else:
            links = next(
                ((step,) for mine, step in steps_of(user, read) if read.op != "cat" and self.versions.read(mine, user) is value),
                None,
            )
        if links is None:
            return
        for path in self.forwards(user, depth + 1):
            yield replace(path, links=links + path.links)


def steps_of(node: fx.Node, read: Call) -> Iterator[tuple[fx.Node, Step]]:
    """Yield each tensor that `node` may be a step on, with that step."""
    if read.op == "cat":
        tensors = read["tensors"]
        if len(tensors) == 2:
            for place, value in enumerate(tensors):
                holed = tuple(SCORE if at == place else other for at, other in enumerate(tensors))
                yield value, Step(_overload(node), {**read.arguments, "tensors": holed}, node)
        return
    if read.op == "cast":
        yield source(node), Step(torch.ops.aten.to.dtype, {"self": SCORE, "dtype": dtype(node)}, node)
        return
    if not _is_pointwise(node, read):
        return
    plain = (read.writes and private.functional(_overload(node))) or _overload(node)
    for name, value in read.arguments.items():
        if name != "condition" and name != "mask" and is_tensor(value) and not is_number(value):
            yield value, Step(plain, {**read.arguments, name: SCORE}, node)


def _overload(node: fx.Node) -> private.Operator:
    assert isinstance(node.target, private.Operator)
    return node.target


def _is_pointwise(node: fx.Node, read: Call) -> bool:
    if not isinstance(node.target, private.Operator) or not is_tensor(node):
        return False
    return torch.Tag.pointwise in node.target.tags or read.op in _POINTWISE
