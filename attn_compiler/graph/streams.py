"""Where queries and keys come from: their tokens, followed back through everything that treats all tokens alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from attn_compiler.graph.atom import Axis
from attn_compiler.graph.record import GraphSite, Operand
from attn_compiler.graph.tokens import Before, Cut, Dims, before, is_parameter

_UNCUT: frozenset[tuple[Cut, ...]] = frozenset({()})
_MOST_VISITED = 200  # nodes of one walk; a projection's input is never far
_QUERIES, _KEYS = "queries", "keys"


@dataclass(frozen=True)
class Origin:
    """What the tokens of queries and keys have in common."""

    same: bool = False  # both are made of the same tokens
    in_order: bool = False  # and token by token, neither shifted nor cut against each other
    joined: bool = False  # of several streams of tokens, one behind the other
    learned: bool = False  # queries are made of parameters alone
    projected: bool = False  # at least one of them is a projection, so that there is an origin to find


def origin(site: GraphSite) -> Origin:
    """Follow queries and keys back, the latest node first, until they meet."""
    walk = _Walk()
    walk.reach(_QUERIES, site.q.node, _Reached(_tokens(site.q, site.queries)))
    walk.reach(_KEYS, site.k.node, _Reached(_tokens(site.k, site.keys)))
    for node, reached in walk:
        if walk.meet(node, reached):
            queries, keys = reached[_QUERIES], reached[_KEYS]
            joined = walk.joined == {_QUERIES, _KEYS} or _is_joined(node, queries.dims)
            return Origin(same=True, in_order=queries.ways == keys.ways, joined=joined, projected=bool(walk.projected))
        for side, at in reached.items():
            walk.follow(side, node, at)
    return Origin(learned=_QUERIES not in walk.activations, projected=bool(walk.projected))


def _tokens(operand: Operand, tokens: Axis) -> Dims:
    return frozenset(dim for dim, axis in enumerate(operand.axes) if any(atom in tokens for atom in axis))


@dataclass(frozen=True)
class _Reached:
    """How one side has reached a node: where that holds its tokens, and all the ways by which they come from there."""

    dims: Dims
    projected: bool = False
    ways: frozenset[tuple[Cut, ...]] = _UNCUT

    def __or__(self, other: _Reached) -> _Reached:
        return _Reached(self.dims | other.dims, self.projected or other.projected, self.ways | other.ways)

    def through(self, step: Before) -> _Reached:
        ways = frozenset((*way, step.cut) for way in self.ways) if step.cut else self.ways
        return _Reached(step.dims, self.projected or step.projected, ways)


@dataclass
class _Walk:
    """The nodes that were reached and not followed yet, with how each side reached them."""

    frontier: dict[fx.Node, dict[str, _Reached]] = field(default_factory=dict)
    projected: set[str] = field(default_factory=set)  # sides that have passed a projection
    joined: set[str] = field(default_factory=set)  # sides that have passed a concatenation of streams
    activations: set[str] = field(default_factory=set)  # sides that end in something that is no parameter
    visited: int = 0

    def __iter__(self) -> Iterator[tuple[fx.Node, dict[str, _Reached]]]:
        while self.frontier and self.visited < _MOST_VISITED:
            self.visited += 1
            latest = max(self.frontier)
            yield latest, self.frontier.pop(latest)
        for reached in self.frontier.values():
            self.activations.update(reached)

    def reach(self, side: str, node: fx.Node, at: _Reached) -> None:
        mine = self.frontier.setdefault(node, {})
        mine[side] = mine[side] | at if side in mine else at

    def follow(self, side: str, node: fx.Node, at: _Reached) -> None:
        """Go on with what the tokens of `node` are made of."""
        steps = before(node, at.dims)
        if steps is None:
            self.activations.add(side)
            return
        if any(step.projected for step in steps):
            self.projected.add(side)
        if len(steps) > 1 and any(step.cut for step in steps) and _streams(steps) > 1:
            self.joined.add(side)
        for step in steps:
            self.reach(side, step.node, at.through(step))

    def meet(self, node: fx.Node, reached: dict[str, _Reached]) -> bool:
        """Whether queries and keys are both made of the tokens of `node`; a table of positions beside them is no origin."""
        if len(reached) < 2 or is_parameter(node):
            return False
        queries, keys = reached[_QUERIES], reached[_KEYS]
        if any(side in self.projected and not at.projected for side, at in reached.items()):
            return False
        apart = queries.dims and keys.dims and not queries.dims & keys.dims
        return not apart and (queries.ways == keys.ways or _UNCUT in (queries.ways, keys.ways))


def _is_joined(node: fx.Node, dims: Dims) -> bool:
    """Whether, but for norms and the like, `node` is a concatenation of streams."""
    walk = _Walk()
    walk.reach(_QUERIES, node, _Reached(dims))
    for reached, sides in walk:
        walk.follow(_QUERIES, reached, sides[_QUERIES])
        if walk.joined:
            return True
        if walk.projected or walk.activations:
            return False
    return False


def _streams(parts: tuple[Before, ...]) -> int:
    """How many streams of tokens they are: neither parameters, such as a token for the class of an image, nor slices of one."""
    seen: dict[fx.Node, Dims] = {}
    found = 0
    for part in filter(_is_activation, parts):
        ways = _only_ways(part)
        shared = [node for node in ways if node in seen]
        found += not shared or _is_joined(max(shared), ways[max(shared)])
        seen |= ways
    return found


def _is_activation(part: Before) -> bool:
    walk = _Walk()
    walk.reach(_QUERIES, part.node, _Reached(part.dims))
    for reached, sides in walk:
        walk.follow(_QUERIES, reached, sides[_QUERIES])
        if walk.activations or walk.projected:
            return True
    return bool(walk.activations)


def _only_ways(part: Before) -> dict[fx.Node, Dims]:
    """The nodes that all of an activation comes through, up to its projection, and where they hold tokens."""
    found: dict[fx.Node, Dims] = {}
    waiting = {part.node: part}
    while waiting:
        node = max(waiting)
        at = waiting.pop(node)
        if not waiting:
            found[node] = at.dims
        steps = before(node, at.dims)
        if steps is None or any(step.projected for step in steps):
            break
        waiting |= {step.node: step for step in steps if len(steps) == 1 or _is_activation(step)}
    return found
