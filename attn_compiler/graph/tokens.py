"""What a tensor is made of, token by token: the operands of a node that hold the same tokens in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.graph.axes import Atoms, rearranges, repeats, source
from attn_compiler.graph.calls import Argument, Call, call, equal, is_tensor, shape, value
from attn_compiler.graph.contraction import contraction

Dims = frozenset[int]  # the dimensions of a tensor that hold its tokens; none where there is one token, or nobody knows
Cut = tuple[str, ...]  # what gave tokens other places: a slice, a roll, their part in a concatenation


@dataclass(frozen=True)
class Before:
    """An operand, and how the tokens of a node come from it."""

    node: fx.Node
    dims: Dims
    projected: bool = False  # by a product with a weight
    cut: Cut | None = None


def before(node: fx.Node, dims: Dims) -> tuple[Before, ...] | None:
    """The operands with the tokens of `node`; none for a parameter, None where an operation mixes tokens or makes them."""
    read = call(node)
    if node.op == "placeholder" or node.op == "get_attr":
        return () if is_parameter(node) else None
    if not is_tensor(node):
        return None
    if rearranges(node) or repeats(node):
        return (Before(source(node), _through_view(node, dims)),)
    if read.op in _RULES:
        return _RULES[read.op](node, read, dims)
    if _is_pointwise(node, read):
        return tuple(_beside(node, dims, node.all_input_nodes))
    return _product(node, dims)


def is_parameter(node: fx.Node) -> bool:
    """Whether this is an input that does not change from call to call."""
    return node.op == "get_attr" or private.is_parameter(node) or (node.op == "placeholder" and "buffers_" in node.name)


def _through_view(node: fx.Node, dims: Dims) -> Dims:
    """The dimensions of a view's source that hold what `dims` of the view do."""
    atoms = Atoms()
    axes = atoms.fresh(shape(source(node)))
    following = atoms.follow(node, axes)
    if following is None:
        return frozenset()
    wanted = {atom for dim in dims for atom in atoms.resolve(following[dim]) if not atom.is_unit}
    return frozenset(dim for dim, axis in enumerate(axes) if wanted.intersection(atoms.resolve(axis)))


def _beside(node: fx.Node, dims: Dims, operands: Iterable[fx.Node]) -> Iterable[Before]:
    """Operands as broadcasting aligns them; what is the same for all tokens is left out."""
    sizes = shape(node)
    for operand in operands:
        if not is_tensor(operand):
            continue
        own, ahead = shape(operand), len(sizes) - len(shape(operand))
        kept = frozenset(dim - ahead for dim in dims if dim >= ahead and equal(own[dim - ahead], sizes[dim]))
        if kept or not dims:
            yield Before(operand, kept)


def _is_pointwise(node: fx.Node, read: Call) -> bool:
    return isinstance(node.target, private.Operator) and (
        torch.Tag.pointwise in node.target.tags or read.op in ("where", "masked_fill", "clamp", "cast", "dropout")
    )


def _product(node: fx.Node, dims: Dims) -> tuple[Before, ...] | None:
    """A projection: the product of an activation and a parameter."""
    found = contraction(node)
    if found is None:
        return None
    for weight, tokens in ((found.right, found.left), (found.left, found.right)):
        if is_weight(weight.node):
            wanted = {found.out[dim] for dim in dims}
            kept = frozenset(dim for dim, label in enumerate(tokens.labels) if label in wanted)
            return (Before(tokens.node, kept, projected=True),)
    return None


def is_weight(node: fx.Node) -> bool:
    """Whether this is a parameter, laid out or cast otherwise."""
    while not is_parameter(node) and is_tensor(node) and (rearranges(node) or call(node).op == "cast"):
        node = source(node)
    return is_parameter(node)


Rule = Callable[[fx.Node, Call, Dims], tuple[Before, ...] | None]


def _first(name: str, *, projected: bool = False) -> Rule:
    """Each token is made of the token at the same place of one operand, whatever its other dimensions are."""

    def rule(node: fx.Node, read: Call, dims: Dims) -> tuple[Before, ...] | None:
        operand: Argument = read.get(name)
        return (Before(operand, dims, projected),) if is_tensor(operand) else None

    return rule


def _cut(node: fx.Node, read: Call, dims: Dims) -> tuple[Before, ...] | None:
    """Some of the tokens, or all of them at other places, unless it is another dimension that is cut."""
    moved = _cut_dims(node, read) & dims
    told = (read.op, *(str(value(x)) for name, x in read.arguments.items() if name != "self"))
    return (Before(read["self"], dims, cut=told if moved else None),)


def _slice(node: fx.Node, read: Call, dims: Dims) -> tuple[Before, ...] | None:
    """Of an input that the graph writes to, what is written says whose tokens these are: a cache that grows in place."""
    given = read["self"].op == "placeholder" and _filled(read["self"], read, dims)
    return given or _cut(node, read, dims)


def _cut_dims(node: fx.Node, read: Call) -> Dims:
    rank = len(shape(node))
    if read.op == "pad":
        return frozenset(range(rank - len(read["pad"]) // 2, rank))
    if read.op == "roll":
        return frozenset(dim % rank for dim in read["dims"] or range(rank))
    return frozenset((read["dim"] % rank,))


def _item(node: fx.Node, read: Call, dims: Dims) -> tuple[Before, ...] | None:
    """One of several results: a part along an axis, or the output of a norm."""
    whole = read["self"]
    inner = call(whole)
    operand = inner.get("self", inner.get("input"))
    if inner.op not in PARTS or not is_tensor(operand):
        return None
    return (Before(operand, _without(inner["dim"], operand, dims) if inner.op == "unbind" else dims),)


def _select(node: fx.Node, read: Call, dims: Dims) -> tuple[Before, ...] | None:
    return (Before(read["self"], _without(read["dim"], read["self"], dims)),)


def _without(dropped: int, operand: fx.Node, dims: Dims) -> Dims:
    dropped %= len(shape(operand))
    return frozenset(dim + (dim >= dropped) for dim in dims)


def _cat(node: fx.Node, read: Call, dims: Dims) -> tuple[Before, ...] | None:
    along = read["dim"] % len(shape(node)) in dims
    return tuple(Before(x, dims, cut=("cat", str(place)) if along else None) for place, x in enumerate(read["tensors"]))


def _nothing(node: fx.Node, read: Call, dims: Dims) -> tuple[Before, ...] | None:
    return ()


def _filled(node: fx.Node, read: Call, dims: Dims) -> tuple[Before, ...] | None:
    """An empty tensor is made of what is written into its slices."""
    slices, found = [node], list[Before]()
    for view in slices:
        slices += [user for user in view.users if call(user).op == "slice"]
        writes = (call(user) for user in view.users if call(user).op == "copy" and call(user)["self"] is view)
        found += [Before(write["src"], dims) for write in writes if is_tensor(write["src"])]
    return tuple(found) or None


PARTS = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "native_layer_norm", "native_group_norm")
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution"), _first("input", projected=True)),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "_fused_rms_norm"), _first("input")),
    **dict.fromkeys(("view_as_complex", "view_as_real", "normalize"), _first("self")),
    **dict.fromkeys(("pad", "roll"), _cut),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"), _first("self")),
    **dict.fromkeys(("mean", "sum", "var", "norm", "linalg_vector_norm", "amax"), _nothing),  # of the features of a token
    **dict.fromkeys(("cos", "sin", "arange", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like"), _nothing),
    **dict.fromkeys(("empty", "new_empty", "empty_like"), _filled),
    "addmm": _first("mat1", projected=True),
    "encoded": _first("x"),
    "decoded": _first("rows"),
    "placed": _first("held"),
    "index_copy": _first("source"),  # a cache of fixed size: what is new in it says whose tokens these are
    "index_put": _first("values"),
    "recall": _first("new"),  # of the others states are left
    "copy": _first("src"),  # one that slides is written anew as a whole
    "item": _item,
    "select": _select,
    "slice": _slice,
    "cat": _cat,
}
