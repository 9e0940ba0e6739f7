"""Finds the products with weights that q, k and v of an attention come from, and those that take its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from attn_compiler.graph.axes import rearranges
from attn_compiler.graph.calls import call, is_tensor, shape
from attn_compiler.graph.contraction import Label, Side, contraction
from attn_compiler.graph.describe import Described
from attn_compiler.graph.names import module_path, title
from attn_compiler.graph.record import GraphSite
from attn_compiler.graph.tokens import PARTS, Before, before, is_parameter, is_weight
from attn_compiler.planning.site import Projections

_MOST_VISITED = 150  # nodes of one walk; a projection is never far
_KEEPING = ("copy", "same", "cast", "cat", "encoded", "index_copy", "index_put", "slice_scatter", "trait")  # what a cache does


@dataclass(frozen=True)
class Product:
    """`out = sum over the labels missing there of (x * weight)`, to which `bias` is added along the last dimension."""

    x: Side
    weight: Side
    out: tuple[Label, ...]
    bias: fx.Node | None = None


def product(node: fx.Node) -> Product | None:
    """Read `node` as the product of an activation and a weight."""
    read = call(node)
    if read.op == "linear":
        rows = tuple(range(len(shape(read["input"])) - 1))
        return Product(Side(read["input"], (*rows, "d")), Side(read["weight"], ("j", "d")), (*rows, "j"), read["bias"])
    if read.op == "addmm" and read["alpha"] == read["beta"] == 1:
        found = Product(Side(read["mat1"], ("i", "d")), Side(read["mat2"], ("d", "j")), ("i", "j"), read["self"])
        return found if is_weight(found.weight.node) else None
    of = contraction(node)
    if of is None or of.shared or of.steps or not of.summed:
        return None
    sides = ((of.left, of.right), (of.right, of.left))
    return next((Product(x, weight, of.out) for x, weight in sides if is_weight(weight.node)), None)


class _UnclearError(Exception):
    """Why nobody can tell which products are meant."""


@dataclass(frozen=True)
class _Found:
    """The products in front of an attention, the nodes on the way there, those of itself, and the products behind it."""

    makers: tuple[fx.Node, ...]
    met: frozenset[fx.Node]
    attends: frozenset[fx.Node]
    takers: tuple[fx.Node, ...]


def with_projections(described: Sequence[Described], blocked: str, graph: int) -> tuple[Described, ...]:
    """Tell each attention of the graph of that number which products are its projections, or why that is not known."""
    found = [_found(one.found) for one in described]
    known = [one for one in found if isinstance(one, _Found)]
    products = dict.fromkeys(x for one in known for x in (*one.makers, *one.takers))
    numbers = {node: (graph, number) for number, node in enumerate(products)}
    inside = frozenset(node for one in known for node in (*between(one.makers, one.met), *one.attends))
    return tuple(_told(one, its, numbers, inside, blocked) for one, its in zip(described, found, strict=True))


def _told(
    one: Described, found: _Found | str, numbers: Mapping[fx.Node, tuple[int, int]], inside: frozenset[fx.Node], blocked: str
) -> Described:
    missing = blocked or (found if isinstance(found, str) else _stranger(found, inside))
    if missing or isinstance(found, str):
        return replace(one, site=replace(one.site, projections=Projections(missing=missing)))
    nodes = (*found.makers, *found.takers)
    names = tuple(_name(node, one.found.name) for node in nodes)
    told = Projections(names, frozenset(numbers[node] for node in nodes))
    return replace(one, site=replace(one.site, projections=told), makers=found.makers, takers=found.takers)


def _found(site: GraphSite) -> _Found | str:
    try:
        walk = _Walk()
        for name, operand in (("q", site.q), ("k", site.k), ("v", site.v)):
            walk.makers_of(operand.node, name)
        makers = sorted(set().union(*walk.known.values()))
        attends = between([operand.node for operand in (site.q, site.k, site.v)], frozenset((site.out.node,)))
        return _Found(tuple(makers), frozenset(walk.known), frozenset(attends), tuple(_takers(site.out.node)))
    except _UnclearError as reason:
        return str(reason)


@dataclass
class _Walk:
    """A way back from the operands of an attention; `known` are the products that each node comes from."""

    known: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)

    def makers_of(self, node: fx.Node, name: str) -> None:
        """Find the products that an operand comes from. Keys and values may come from a cache, a query may be a parameter."""
        try:
            found = self._back(node)
        except _UnclearError as reason:
            raise _UnclearError(f"its {name} {reason}") from None
        if name == "q" and not found and not is_weight(node):
            raise _UnclearError("its q comes from no product with a weight in this graph")

    def _back(self, node: fx.Node) -> frozenset[fx.Node]:
        if node not in self.known:
            if len(self.known) > _MOST_VISITED:
                raise _UnclearError("comes from no product with a weight nearby")
            self.known[node] = frozenset()
            self.known[node] = frozenset((node,)) if product(node) else self._through(node)
        return self.known[node]

    def _through(self, node: fx.Node) -> frozenset[fx.Node]:
        steps = _steps(node)
        if steps is None or any(step.projected for step in steps):
            if steps is None and not _follows_product(node):
                return frozenset()  # a table, of angles for example
            raise _UnclearError(f"comes from `{call(node).op}`, and not from a product with a weight")
        found = {found for step in steps if (found := self._back(step.node))}
        if len(found) > 1 and call(node).op not in ("cat", "empty", "new_empty"):
            several = ", ".join(sorted(_name(x, "") for x in frozenset().union(*found)))
            raise _UnclearError(f"is made of several products with weights ({several}): merge what adapts a layer into it")
        return frozenset().union(*found)


def _steps(node: fx.Node) -> tuple[Before, ...] | None:
    """What a node is made of, whichever tokens that holds: pairs that are turned, and parts that are picked, too."""
    read = call(node)
    picked: Mapping[str, Sequence[fx.Node]] = {"stack": read.get("tensors", ()), "index": (read.get("self"),)}
    if read.op in picked:
        return tuple(Before(x, frozenset()) for x in picked[read.op])
    return before(node, frozenset()) if node.op == "call_function" else ()


def _follows_product(node: fx.Node) -> bool:
    """Whether any product with a weight comes before a node."""
    waiting, visited = [node], set[fx.Node]()
    while waiting:
        one = waiting.pop()
        if one in visited:
            continue
        visited.add(one)
        if is_tensor(one) and product(one):
            return True
        waiting += one.all_input_nodes
    return False


def _takers(out: fx.Node) -> Iterator[fx.Node]:
    """The products that take all that an attention gives, which nothing but factors joins on the way."""
    reached, waiting, found = {out}, set(out.users), False
    while waiting:
        node = min(waiting)
        waiting.remove(node)
        if node.op == "output":
            raise _UnclearError("its output leaves the graph before a product with a weight takes it")
        read = call(node)
        taken = product(node) if is_tensor(node) else None
        if taken and taken.x.node in reached:
            found = True
            yield node
        elif is_tensor(node) or read.op in PARTS:
            steps = before(node, frozenset()) if is_tensor(node) else ()
            if steps is None or any(step.projected or not _may_join(step.node, read.op, reached) for step in steps):
                raise _UnclearError(f"its output goes into `{read.op}` before a product with a weight takes it")
            if steps or read.op in PARTS:
                reached.add(node)
                waiting |= set(node.users)
    if not found:
        raise _UnclearError("no product with a weight takes its output")


def _may_join(node: fx.Node, op: str, reached: set[fx.Node]) -> bool:
    return node in reached or is_parameter(node) or op in ("mul", "div")


def between(starts: Sequence[fx.Node], ends: frozenset[fx.Node]) -> list[fx.Node]:
    """All that is made of one of `starts` and that one of `ends` is made of, both with them, in the order of the graph."""
    if not starts or not ends:
        return []
    first, last = min(starts), max(ends)
    made, node = set(starts), first
    walked = [first]
    while node is not last and node.op != "output":
        node = node.next
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)
        walked.append(node)
    needed = set(ends)
    for node in reversed(walked):
        if node in needed and node in made:
            needed.update(node.all_input_nodes)
    return [node for node in walked if node in made and node in needed]


def _stranger(found: _Found, inside: frozenset[fx.Node]) -> str:
    """Who else reads what the projections make, but for caches and other attentions; nothing if nobody does."""
    for node in between(found.makers, found.met):
        for user in node.users:
            if user not in inside and not _keeps(user):
                return f"what makes its q, k and v is also read by `{call(user).op}`, which is no part of an attention"
    return ""


def _keeps(node: fx.Node) -> bool:
    """Whether a node hands on what it is given to a cache, to whoever called the graph, or not at all."""
    if node.op == "output" or call(node).writes or not is_tensor(node) or call(node).op == "new_empty":
        return True  # room of the same type reads no number
    return (rearranges(node) or call(node).op in _KEEPING) and all(map(_keeps, node.users))


def _name(node: fx.Node, site: str) -> str:
    """What a model calls a product, seen from an attention: its module, or its weight where it stands beside that."""
    path, found = module_path(node).split("."), product(node)
    for part in site.split("."):
        path = path[1:] if path[:1] == [part] else path
    weight = title(found.weight.node).removesuffix(".weight") if found else ""
    return ".".join(path) or weight or node.name
